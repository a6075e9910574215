"""Which engine and which policies would be chosen here, and why: asked of the library itself, for models that are named."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ... import engines
from ...devices.manager import Device
from ...engines.kernels import describe
from ...launch.topology import Topology, uses_cpu
from ...memory import model_sizes
from ...memory.estimate import estimate
from ...plugin import UnslothPlugin
from ...policies import activation_checkpointing, attention, micro_batch
from .finding import NOTE, PROBLEM, Finding

# What a choice depends on is the model, which is not known here: these stand for the usual cases.
_LORA, _ALL = "LoRA on 8 B parameters", "8 B parameters, all trained"
_SIZES = {
    _LORA: {"trainable": 42_000_000, "total": 8_000_000_000},
    _ALL: {"trainable": 8_000_000_000, "total": 8_000_000_000},
}
_MODEL, _ROW_TOKENS, _ROWS_OF_A_STEP, _LENGTHS = "8B", 2048, 8, 1000
_PLANNED = f"{_LORA} in 4 bits, rows of {_ROW_TOKENS:,} tokens"


@dataclass(frozen=True)
class Choices:
    engine: str | None  # None if it cannot be chosen
    findings: tuple[Finding, ...]


def findings(visible_gpus: int, devices: Sequence[Device] = (), kernels: dict | None = None) -> Choices:
    """
    Resolve what the library would, with the options of this environment.

    Args:
        visible_gpus (`int`): GPUs that torch can use.
        devices (`Sequence[Device]`, *optional*): Those that are visible, for their memory.
        kernels (`dict`, *optional*): What [`kernels.describe`] says of Unsloth, as the probe read it.
    """
    use_cpu = uses_cpu()
    try:
        plugin = UnslothPlugin()
        engine = engines.resolve(plugin.engine, 0 if use_cpu else visible_gpus, use_cpu)
    except ValueError as error:
        return Choices(None, (Finding("options", str(error), PROBLEM),))
    processes = Topology.from_environment().world_size if "WORLD_SIZE" in os.environ else max(visible_gpus, 1)
    found = [
        Finding("engine", f"{engine.name}: {engine.reason}"),
        *_attention(plugin, engine.name, kernels),
        *_cut(
            plugin, min((d.total_gib for d in devices), default=None) if engine.name == "unsloth" else None, processes
        ),
    ]
    return Choices(engine.name, tuple(found))


def engine_name(visible_gpus: int) -> str | None:
    """The engine that would be chosen; `None` if the options do not allow one."""
    return findings(visible_gpus).engine


def _attention(plugin: UnslothPlugin, engine: str, kernels: dict | None) -> Iterator[Finding]:
    if engine == "unsloth" and kernels is None:
        return  # Unsloth could not be asked, which is a finding of its own
    try:
        chosen = attention.resolve(
            plugin.attention, attention.Facts(lengths=_LENGTHS, **(kernels or describe(engine)))
        )
    except ValueError as error:
        yield Finding("attention", str(error), PROBLEM)
        return
    yield Finding("attention", f"rows of {_LENGTHS:,} different lengths: {chosen.backend}: {chosen.reason}")


def _cut(plugin: UnslothPlugin, gpu_gib: float | None, processes: int) -> Iterator[Finding]:
    """Checkpointing and micro-batches, of a model that is trained on the smallest GPU; on a CPU neither is planned."""
    kept = recomputed = 0
    if gpu_gib is not None:
        shape = model_sizes.resolve(_MODEL).shape
        kept, recomputed = (
            estimate(shape, checkpointing=recompute, num_gpus=processes).largest_micro_batch(
                gpu_gib, plugin.memory_fraction
            )
            for recompute in (False, True)
        )
        if recomputed < _ROW_TOKENS:
            why = f"{_PLANNED}: does not fit {gpu_gib:.1f} GiB"
            remedy = "`accelerate-unsloth estimate-memory MODEL` shows what a smaller one takes."
            yield Finding("gradient checkpointing", why, NOTE, remedy)
            return
    fixed = micro_batch.why_fixed(plugin.micro_batch, True)  # the script's checkpointing stays then as well
    facts = activation_checkpointing.Facts(
        _ROW_TOKENS, _ROWS_OF_A_STEP * _ROW_TOKENS, None if gpu_gib is None or fixed else kept, recomputed
    )
    recompute = activation_checkpointing.resolve(plugin.gradient_checkpointing, facts)
    yield Finding("gradient checkpointing", f"{_PLANNED}: {recompute.mode}: {recompute.reason}")
    fits = (kept if recompute.mode == "none" else recomputed) if gpu_gib is not None else None
    try:
        cut = micro_batch.resolve(plugin.micro_batch, plugin.micro_batch_tokens, micro_batch.Facts(_ROW_TOKENS, fits))
    except ValueError as error:
        yield Finding("micro-batches", str(error), NOTE)
        return
    yield Finding("micro-batches", f"{_PLANNED}: {cut.mode}: {cut.reason}")
