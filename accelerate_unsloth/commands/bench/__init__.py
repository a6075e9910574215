"""`accelerate-unsloth bench`: plain Unsloth, ours, and our choices one by one, on this machine."""

from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Trainer(str, Enum):
    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    ORPO = "orpo"


def bench(
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
    ablation: Annotated[bool, typer.Option(help="Take our choices back one by one.")] = True,
    quick: Annotated[bool, typer.Option(help="A tiny model on CPU processes: a look at the command.")] = False,
) -> None:
    """Measure tokens/s, start-up, memory and losses of the same fine-tune in separate launches."""
    from ...testing import tiny_model
    from . import show
    from .runs import Workload, measure, pinned, plan

    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    made = "tiny" if quick else model
    folder = tiny_model.make_model(made, out / made) if made in tiny_model.DIMENSIONS else Path(model).absolute()
    data = data or make_data(
        out / "data.jsonl", trainer.value, 48 if quick else samples, *((4.0, 0.8) if quick else ())
    )
    if quick:
        counts = [1, 2]
        runs = plan(counts, [], batch=2, with_trl=False, ablation=False)
        work = Workload(
            str(folder), str(data), 3, 8, 128, load_in_4bit=False, optim="adamw_torch", cpu=True, trainer=trainer.value
        )
    else:
        counts = [int(count) for count in processes.split(",") if count] or sorted({1, max(1, _gpus())})
        sizes = [int(size) for size in plain_batches.split(",") if size]
        runs = plan(counts, sizes, batch, with_trl, ablation)
        work = Workload(
            str(folder), str(data.absolute()), steps, effective_batch, max_length, load_in_4bit, trainer=trainer.value
        )
    if use_gradient_checkpointing:
        asked_for = {"use_gradient_checkpointing": use_gradient_checkpointing}
        runs = [replace(run, lora=run.lora | asked_for) for run in runs]
    works = [work_of(run, work, max(counts) if equal_share else run.processes) for run in runs]
    results = []
    for run, its_work in zip(runs, works, strict=True):
        typer.echo(f"{run.name} ...")
        results.append(measure(pinned(run, results), its_work, out / run.name.replace(" ", "_")))
        show.write_json(results, asdict(work) | {"equal_share": equal_share}, out / "results.json")
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
    """
    The workload of one run: its part of the effective batch of `most_processes`.

    Raises:
        BadParameter: if the effective batch cannot be cut so.
    """
    effective_batch, rest = divmod(work.effective_batch * run.processes, most_processes)
    if rest or effective_batch % (run.batch * run.processes):
        raise typer.BadParameter(
            f"{run.name}: effective batch {work.effective_batch * run.processes / most_processes:g} is not a multiple of "
            f"batch {run.batch} x processes {run.processes}"
        )
    return replace(work, effective_batch=effective_batch)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
