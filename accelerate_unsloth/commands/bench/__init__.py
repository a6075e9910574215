"""`accelerate-unsloth bench`: plain Unsloth, ours, and our choices one by one, on this machine."""

from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from ...reporting.verbosity import drop_what_users_cannot_act_on


class Preset(str, Enum):
    NOTEBOOK = "notebook"
    THROUGHPUT = "throughput"
    SCALING = "scaling"
    SMALL_GPU = "small-gpu"


# Batch 2 x accumulation 4 on each process is what Unsloth's notebooks have.
_NOTEBOOK_SAMPLES = 8
_EVERY_PRESET = {"with_trl": False, "ablation": False}
_PRESETS = {
    Preset.NOTEBOOK: {
        "plain_batches": "2", "batch": 2, "use_gradient_checkpointing": "unsloth", "equal_share": True, "steps": 100,
    },
    Preset.THROUGHPUT: {"steps": 160},
    Preset.SCALING: {"plain_batches": "", "equal_share": True},
    Preset.SMALL_GPU: {"plain_batches": "2,4", "batch": 4, "gpu_gib": "24,16"},
}  # fmt: skip
# A look at the command: in place of all options.
_QUICK = {
    "model": "tiny", "samples": 48, "steps": 3, "effective_batch": 8, "max_length": 128, "load_in_4bit": False,
    "processes": "1,2", "plain_batches": "", "batch": 2, "with_trl": False, "ablation": False,
}  # fmt: skip


class Trainer(str, Enum):
    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    ORPO = "orpo"


def bench(
    context: typer.Context,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="Options for one question: the settings of Unsloth's notebooks, plain at its best batch, 1 and all GPUs, or "
            "GPUs of 24 and 16 GiB. Other options take precedence."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.png and each run's log.")] = Path(
        "bench"
    ),
    trainer: Annotated[
        Trainer, typer.Option(help="Supervised fine-tuning, or preference training by this method.")
    ] = Trainer.SFT,
    model: Annotated[str, typer.Option(help="8b, 1b or 135m with random weights, or the folder of a model.")] = "8b",
    data: Annotated[
        Path | None, typer.Option(help="JSON Lines with the trainer's columns; made if not given.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of the data that is made.")] = 4096,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 40,
    effective_batch: Annotated[int, typer.Option(help="Samples of an optimizer step.")] = 64,
    max_length: Annotated[int, typer.Option(help="Longest sample in tokens.")] = 2048,
    processes: Annotated[
        str, typer.Option(help="Numbers of processes, such as 1,2,4; by default 1 and all GPUs.")
    ] = "",
    plain_batches: Annotated[str, typer.Option(help="Per-device batches of plain Unsloth.")] = "4,8,16",
    batch: Annotated[int, typer.Option(help="Per-device batch that ours is given.")] = 16,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantize the weights.")] = True,
    use_gradient_checkpointing: Annotated[
        str, typer.Option(help="What the script passes to get_peft_model, such as unsloth; nothing by default.")
    ] = "",
    with_trl: Annotated[bool, typer.Option(help="Also TRL and PEFT without Unsloth.")] = True,
    equal_share: Annotated[
        bool, typer.Option(help="As many samples of a step on each process: --effective-batch is that of the most.")
    ] = False,
    gpu_gib: Annotated[
        str, typer.Option(help="Memory of each GPU that PyTorch may use, such as 24,16: every run with each.")
    ] = "",
    ablation: Annotated[bool, typer.Option(help="Take our choices back one by one.")] = True,
    quick: Annotated[bool, typer.Option(help="A tiny model on CPU processes: a look at the command.")] = False,
) -> None:
    """Measure tokens/s, start-up, memory and losses of the same fine-tune in separate launches."""
    given = {name: value for name, value in locals().items() if name != "context"}
    drop_what_users_cannot_act_on()
    chosen = _chosen(context, given, preset)
    chosen.out.mkdir(parents=True, exist_ok=True)
    counts = _counts(chosen.processes)
    if preset is Preset.NOTEBOOK and _is_open(context, "effective_batch"):
        chosen.effective_batch = _NOTEBOOK_SAMPLES * max(counts)
    work, runs = _workload(chosen), _runs(chosen, counts)
    most = [max(counts) if chosen.equal_share else run.processes for run in runs]
    works = [work_of(run, work, processes) for run, processes in zip(runs, most, strict=True)]
    _measure_all(runs, works, asdict(work) | {"equal_share": chosen.equal_share}, chosen.out)


def _chosen(context: typer.Context, given: dict, preset: Preset | None) -> SimpleNamespace:
    """
    Return all options: those of the preset where they were not given, and those of the quick form.

    They are not read from `context.params`, because the types there depend on the version of Typer.
    """
    defaults = _EVERY_PRESET | _PRESETS[preset] if preset else {}
    of_preset = {name: value for name, value in defaults.items() if _is_open(context, name)}
    chosen = SimpleNamespace(**given | of_preset | (_QUICK if given["quick"] else {}))
    chosen.out = chosen.out.absolute()
    return chosen


def _is_open(context: typer.Context, option: str) -> bool:
    return context.get_parameter_source(option).name == "DEFAULT"


def _workload(chosen):
    """Return what all runs train, with a model and data that are made where none are given."""
    from ...testing import tiny_model
    from .runs import Workload

    name, data, trainer = chosen.model, chosen.data, chosen.trainer.value
    made = name in tiny_model.DIMENSIONS
    folder = tiny_model.make_model(name, chosen.out / name) if made else Path(name).absolute()
    if data is None:
        lengths = (4.0, 0.8) if chosen.quick else ()
        data = make_data(chosen.out / "data.jsonl", trainer, chosen.samples, *lengths)
    size = {name: getattr(chosen, name) for name in ("steps", "effective_batch", "max_length", "load_in_4bit")}
    on_cpu = {"optim": "adamw_torch", "cpu": True} if chosen.quick else {}
    return Workload(str(folder), str(data.absolute()), **size, **on_cpu, trainer=trainer)


def _runs(chosen, counts: list[int]) -> list:
    from .runs import limited, plan

    sizes = [int(size) for size in chosen.plain_batches.split(",") if size]
    runs = plan(counts, sizes, chosen.batch, chosen.with_trl, chosen.ablation)
    if limits := [float(gib) for gib in chosen.gpu_gib.split(",") if gib]:
        runs = [run for gpu_gib in limits for run in limited(runs, gpu_gib)]
    if not chosen.use_gradient_checkpointing:
        return runs
    asked_for = {"use_gradient_checkpointing": chosen.use_gradient_checkpointing}
    return [replace(run, lora=run.lora | asked_for) for run in runs]


def _measure_all(runs: list, works: list, described: dict, out: Path) -> None:
    """Measure one run after the other, and write what there is after each; exit with status 1 if one failed."""
    from . import show
    from .runs import measure, pinned

    results = []
    for run, its_work in zip(runs, works, strict=True):
        typer.echo(f"{run.name} ...")
        results.append(measure(pinned(run, results), its_work, out / run.name.replace(" ", "_")))
        show.write_json(results, described, out / "results.json")
    show.print_table(results)
    show.write_chart(results, out / "results.png")
    typer.echo(f"results.json and results.png are in {out}")
    if any("error" in result for result in results):
        raise typer.Exit(1)


def make_data(file: Path, trainer: str, samples: int, *lengths: float) -> Path:
    """Write data of a trainer's columns; `lengths` are the mean and spread of the logarithm of the characters of a row."""
    from ...testing import tiny_model

    if trainer == "sft":
        return tiny_model.make_data(file, samples, *lengths)
    return tiny_model.make_answers(file, samples, *lengths, paired=trainer != "kto")


def work_of(run, work, most_processes: int):
    """Return the workload of one run, with its part of the effective batch of `most_processes`, which must be whole."""
    effective_batch, rest = divmod(work.effective_batch * run.processes, most_processes)
    if rest or effective_batch % (run.batch * run.processes):
        raise typer.BadParameter(
            f"{run.name}: effective batch {work.effective_batch * run.processes / most_processes:g} is not a multiple of "
            f"batch {run.batch} x processes {run.processes}"
        )
    return replace(work, effective_batch=effective_batch)


def _counts(processes: str) -> list[int]:
    """Return the numbers of processes: those asked for, or 1 and all GPUs."""
    import torch

    return [int(count) for count in processes.split(",") if count] or sorted({1, max(1, torch.cuda.device_count())})
