"""
`training_report.html`: what ran, on what, how long, and where the time went, in one file that needs no network.

Rank 0 writes it when training ends, from the readings that logging steps exchange anyway. `figures.py` holds the
arithmetic, `charts.py` the drawings, `report.html.j2` the page. Every text of the page is escaped and has its secrets
hidden by the template engine, so that no field can be forgotten.
"""

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from ... import __version__
from ...launch import command
from .. import startup_table
from ..readings import Interval, RankReading, totals
from ..secrets import command_without_secrets, without_secrets

__all__ = ["FILE_NAME", "PhaseSeconds", "Record", "collect", "render", "write"]

FILE_NAME = "training_report.html"


@dataclass
class PhaseSeconds:
    """Seconds of rank 0 in one call of `train()`."""

    total_s: float = 0.0
    preparation_s: float = 0.0  # before the first step
    evaluation_s: float = 0.0
    checkpoints_s: float = 0.0
    unlogged_s: float = 0.0  # steps after the last logging step


@dataclass
class Record:
    """Everything that the page shows of one training, as plain values."""

    model: str  # name or folder
    steps: int  # optimizer steps done
    max_steps: int
    log_history: list[dict[str, Any]]  # of the Trainer, including earlier processes of a resumed run
    began_at_step: int = 0
    stopped: bool = False  # by a signal
    processes: int = 1
    device: str = "CPU"  # of rank 0
    began: str = ""
    spent: PhaseSeconds = field(default_factory=PhaseSeconds)
    history: Sequence[Interval] = ()  # empty if the ranks were not monitored
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    decisions: list[tuple[str, str, str]] = field(default_factory=list)  # subject, decision, reason
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @cached_property
    def ranks(self) -> list[RankReading]:
        """The readings of each rank as one; empty if they were not monitored."""
        return totals(self.history)

    @property
    def model_name(self) -> str:
        """The last part of the model's hub id or path."""
        return PurePath(self.model).name or self.model

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Return step and value of each log entry that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.log_history if key in entry]


def collect(trainer, began: str, began_at_step: int, spent: PhaseSeconds, history, warnings) -> Record:
    """Return the [`Record`] of a trainer that has just trained, on rank 0."""
    import torch

    state, args, data = trainer.state, trainer.args, trainer.train_dataset
    machine = {"Python": platform.python_version(), "system": platform.platform()}
    if torch.version.cuda:
        machine["CUDA"] = f"{torch.version.cuda} (of the PyTorch build)"
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return Record(
        model=getattr(trainer.model.config, "_name_or_path", "") or type(trainer.model).__name__,
        steps=state.global_step,
        max_steps=state.max_steps,
        log_history=list(state.log_history),
        began_at_step=began_at_step,
        stopped=trainer.was_stopped,
        processes=trainer.accelerator.num_processes,
        device=history[0].ranks[0].device if history else str(args.device),
        began=began,
        spent=spent,
        history=history,
        facts=[
            ("Samples", f"{len(data):,}" if hasattr(data, "__len__") else "unknown: a stream"),
            ("Epochs", f"{state.epoch or 0:.4g} of {state.num_train_epochs}"),
            ("Optimizer", str(getattr(args.optim, "value", args.optim))),
            ("Learning rate", f"{args.learning_rate:g}, {schedule}"),
            ("Seed", str(args.seed)),
            ("Output folder", str(args.output_dir)),
        ],
        warnings=list(warnings),
        decisions=[row for row in trainer.decisions() if row[0] != "versions"],
        versions={"accelerate_unsloth": __version__} | startup_table.versions() | machine,
        command=command.script(),
    )


def render(record: Record) -> str:
    """Return the page of a run."""
    import jinja2
    from markupsafe import Markup

    from . import charts, figures

    def shown(value) -> str:
        return value if isinstance(value, Markup) else without_secrets(str(value))

    def number(value):
        """Show a number as people read it, with its exact value for tools."""
        text = figures.number(value)
        return Markup(f'<data value="{value!r}">{text}</data>') if isinstance(value, int | float) else text

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "duration": figures.duration}
    return environment.get_template("report.html.j2").render(
        record=record,
        figures=figures,
        charts=charts.draw(record),
        command=shlex.join(command_without_secrets(record.command)),
    )


def write(record: Record, folder: Path) -> Path:
    """
    Write `training_report.html` into a folder, which is created if needed, completely or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{FILE_NAME}.incomplete"
    try:
        written.write_text(render(record), encoding="utf-8")  # with the permissions of the user's umask
        os.replace(written, folder / FILE_NAME)
    finally:
        written.unlink(missing_ok=True)
    return folder / FILE_NAME
