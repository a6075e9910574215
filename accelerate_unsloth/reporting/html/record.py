"""What is known of a run, as plain values: everything that the page shows."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ... import __version__
from ...launch import command
from .. import startup_table
from ..readings import History


@dataclass
class Spent:
    """
    Seconds of rank 0 in one call of `train()`.

    Args:
        total_s (`float`): All of it.
        preparation_s (`float`): Before the first step: sharding out samples, planning and trying micro-batches.
        evaluation_s (`float`), checkpoints_s (`float`): Between steps.
        unlogged_s (`float`): Steps after the last logging step.
    """

    total_s: float = 0.0
    preparation_s: float = 0.0
    evaluation_s: float = 0.0
    checkpoints_s: float = 0.0
    unlogged_s: float = 0.0


@dataclass
class Record:
    """
    One training.

    Args:
        model (`str`): Name or folder of the model.
        steps (`int`): Optimizer steps that are done, of `max_steps` (`int`).
        log_history (`list[dict]`): What the Trainer logged, of earlier processes of a resumed run too.
        began_at_step (`int`): Steps that were done when this process began.
        stopped (`bool`): Whether a signal ended it.
        processes (`int`): Processes of the launch.
        device (`str`): Where rank 0 computed.
        began (`str`): When, in words.
        spent ([`Spent`]): Where the time went.
        history ([`History`]): Readings of all ranks; empty where they were not monitored.
        facts (`list[tuple[str, str]]`): Further things to tell of the run.
        warnings (`list[str]`): What users were warned of.
        decisions (`list[tuple[str, str, str]]`): Subject, decision and reason of each automatic choice.
        versions (`dict[str, str]`): Of libraries and the machine.
        command (`list[str]`): The script and its arguments.
    """

    model: str
    steps: int
    max_steps: int
    log_history: list[dict[str, Any]]
    began_at_step: int = 0
    stopped: bool = False
    processes: int = 1
    device: str = "CPU"
    began: str = ""
    spent: Spent = field(default_factory=Spent)
    history: History = field(default_factory=History)
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    decisions: list[tuple[str, str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @property
    def model_name(self) -> str:
        """Its last part, of a hub id as of a path."""
        return PurePath(self.model).name or self.model

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Step and value of each log entry that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.log_history if key in entry]


def collect(
    trainer, engine, began: str, began_at_step: int, spent: Spent, history: History, warnings: Sequence[str]
) -> Record:
    """
    The record of a trainer that has just trained.

    Args:
        trainer ([`DistributedTrainerMixin`]): As it stands on rank 0.
        engine ([`EngineChoice`]): Who built the model.
        began (`str`), began_at_step (`int`), spent ([`Spent`]), history ([`History`]), warnings (`Sequence[str]`):
            As in [`Record`].
    """
    state, args = trainer.state, trainer.args
    totals = history.totals()
    return Record(
        model=getattr(trainer.model.config, "_name_or_path", "") or type(trainer.model).__name__,
        steps=state.global_step,
        max_steps=state.max_steps,
        log_history=list(state.log_history),
        began_at_step=began_at_step,
        stopped=trainer.was_stopped,
        processes=trainer.accelerator.num_processes,
        device=totals[0].device if totals else str(args.device),
        began=began,
        spent=spent,
        history=history,
        facts=_facts(trainer),
        warnings=list(warnings),
        decisions=[row for row in trainer.decisions() if row[0] != "versions"],
        versions=_versions(),
        command=command.script(),
    )


def _facts(trainer) -> list[tuple[str, str]]:
    args, data = trainer.args, trainer.train_dataset
    samples = f"{len(data):,}" if hasattr(data, "__len__") else "not known: a stream"
    return [
        ("Samples", samples),
        ("Epochs", f"{trainer.state.epoch or 0:.4g} of {trainer.state.num_train_epochs}"),
        ("Optimizer", str(getattr(args.optim, "value", args.optim))),
        (
            "Learning rate",
            f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        ),
        ("Seed", str(args.seed)),
        ("Output folder", str(args.output_dir)),
    ]


def _versions() -> dict[str, str]:
    import torch

    machine = {"Python": platform.python_version(), "system": platform.platform()}
    if torch.version.cuda:
        machine["CUDA"] = f"{torch.version.cuda}, that PyTorch was built with"
    return {"accelerate_unsloth": __version__} | startup_table.versions() | machine
