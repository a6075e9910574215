"""`accelerate-unsloth estimate-memory MODEL`: memory of a LoRA fine-tune per GPU, from the config alone."""

import json
from dataclasses import asdict
from enum import Enum
from typing import Annotated

import typer

_CASES = [(bits, checkpointing) for bits in (4, 16) for checkpointing in (True, False)]


class Placement(str, Enum):
    REPLICATED = "replicated"
    SHARDED = "sharded"
    HOST = "host"


def estimate_memory(
    model_name: Annotated[
        str, typer.Argument(help="Hub id, the folder of a model or its config, or a size such as 8B.")
    ],
    gpu_gib: Annotated[float, typer.Option(min=0.1, help="Memory of each GPU in GiB.")] = 24.0,
    num_gpus: Annotated[int, typer.Option(min=1, help="Number of processes, one per GPU.")] = 1,
    r: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    optim: Annotated[str, typer.Option(help="The Trainer's optimizer.")] = "adamw_8bit",
    frozen_weights: Annotated[
        Placement,
        typer.Option(help="Where decoder layers are: on each GPU, a part on each, or in the machine's memory."),
    ] = Placement.REPLICATED,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the micro-batch whose peak is shown.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Estimate weights, optimizer and activations per GPU, and the largest micro-batch. Vision towers are not counted."""
    from ..memory import model_sizes
    from ..memory.estimate import estimate

    if frozen_weights is Placement.SHARDED and num_gpus == 1:
        raise typer.BadParameter(
            "one GPU has no other one to share with. Give --num-gpus 2 or more, or --frozen-weights host.",
            param_hint="--frozen-weights sharded",
        )
    try:
        shape = model_sizes.resolve(model_name).shape
        estimates = {
            case: estimate(shape, case[0] == 4, r, optim, case[1], num_gpus, frozen_weights.value) for case in _CASES
        }
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps([_row(case, found, gpu_gib, tokens) for case, found in estimates.items()], indent=2))
    else:
        _print_table(model_name, estimates, gpu_gib, tokens)
        fits = any(found.largest_micro_batch(gpu_gib) for found in estimates.values())
        if not fits and frozen_weights is Placement.REPLICATED:
            typer.echo(
                "Nothing fits with all weights on each GPU. --frozen-weights host keeps the decoder layers in the machine's "
                "memory, --frozen-weights sharded a part of them on each of several GPUs."
            )


def _row(case, found, gpu_gib: float, tokens: int) -> dict:
    return {
        "bits": case[0],
        **asdict(found),
        "activations_measured": not found.shape.has_experts,
        "resting_gib": found.resting_gib,
        "tokens": tokens,
        "peak_gib": found.peak_gib(tokens),
        "largest_micro_batch_tokens": found.largest_micro_batch(gpu_gib),
    }


def _print_table(model_name: str, estimates, gpu_gib: float, tokens: int) -> None:
    from rich.table import Table

    from ..memory.estimate import EXPERTS_NOTE, ITEMS
    from ..reporting.startup_table import console

    table = Table(title=f"{model_name}, LoRA with Unsloth, GiB per GPU", title_justify="left", pad_edge=False)
    if any(found.shape.has_experts for found in estimates.values()):
        table.caption, table.caption_justify = f"Note: {EXPERTS_NOTE}.", "left"
    table.add_column("")
    for bits, checkpointing in estimates:
        table.add_column(f"{bits}-bit, {'checkpointing' if checkpointing else 'all kept'}", justify="right")
    for item in ITEMS:
        table.add_row(item, *(f"{getattr(found, item + '_gib'):.2f}" for found in estimates.values()))
    table.add_section()
    table.add_row("KiB per token", *(f"{found.token_kib:,.0f}" for found in estimates.values()))
    table.add_row(f"peak at {tokens:,} tokens", *(f"{found.peak_gib(tokens):.2f}" for found in estimates.values()))
    if any(found.host_gib for found in estimates.values()):
        table.add_row("host memory, once", *(f"{found.host_gib:.2f}" for found in estimates.values()))
    largest = (found.largest_micro_batch(gpu_gib) for found in estimates.values())
    table.add_row(f"most tokens in 0.9 of {gpu_gib:g} GiB", *(f"{most:,}" if most else "none" for most in largest))
    console().print(table)
