"""
Where the frozen weights of decoder layers live.

`replicated`: every rank holds all of them. `sharded`: each GPU of a node holds a part of the layers, and the others copy them
from it. `host`: one copy per node in shared memory. Every rank chooses for itself, from what is the same on all ranks of a
node, so that a script may load a replicated model on one rank only.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

from ..memory.estimate import FETCHED_LAYERS

_GIB = 2**30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

# Part of a memory that weights may take. On a machine the rest is for libraries, data and activations; on a GPU for adapters,
# their optimizer, and micro-batches that keep it busy.
_HOST_FRACTION, _DEVICE_FRACTION = 0.7, 0.75
_MOST_OF_DEVICE = 0.9  # where nothing else would leave more room

VARIABLE = "ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    layer_bytes: int  # frozen weights of all decoder layers, as loaded
    layers: int
    other_bytes: int  # embeddings, head and the rest, which every rank holds
    local_world_size: int
    host_bytes: int  # memory of this machine, or of the container
    device_bytes: int | None = None  # memory of the smallest GPU of this process's machine; None on a CPU
    cannot_share: str = ""  # why the layers cannot be shared, as one clause
    no_peer_copies: str = ""  # why the GPUs cannot copy from one another, as one clause


@dataclass(frozen=True)
class PlacementChoice:
    mode: str  # "replicated" | "sharded" | "host"
    reason: str  # one clause, shown in the start-up table


def resolve(requested: str, facts: Facts) -> PlacementChoice:
    """
    Choose where the frozen weights live; `requested` is the plugin's option.

    Raises:
        ValueError: for a placement that is not possible here.
        MemoryError: if the memory does not hold the model, with the arithmetic.

    Example:

    ```python
    >>> from accelerate_unsloth.weights.placement import Facts, resolve
    >>> facts = Facts(layer_bytes=30 * 2**30, layers=32, other_bytes=2**30, local_world_size=4, host_bytes=64 * 2**30)
    >>> resolve("auto", facts).mode
    'host'
    ```
    """
    if requested == "replicated":
        return PlacementChoice("replicated", "asked for")
    impossible = {"host": facts.cannot_share, "sharded": facts.cannot_share or _why_not_sharded(facts)}
    if requested != "auto":
        if why := impossible[requested]:
            raise ValueError(f"frozen_weights={requested!r} is not possible: {why}. Set {VARIABLE}=replicated.")
        if lacks := _what_lacks(requested, facts, _MOST_OF_DEVICE):
            raise MemoryError(_does_not_fit(lacks))
        return PlacementChoice(requested, f"asked for; {_where(requested, facts)}")
    if why := facts.cannot_share or _why_replicated(facts):
        return PlacementChoice("replicated", why)
    fractions = {"sharded": _DEVICE_FRACTION, "host": _MOST_OF_DEVICE}
    lacks = {mode: _what_lacks(mode, facts, most) for mode, most in fractions.items() if not impossible[mode]}
    for mode, what in lacks.items():
        if not what:
            too_large = (
                f"{_size(facts.layer_bytes + facts.other_bytes)} of weights leave no room on {_device(facts)}; "
            )
            return PlacementChoice(mode, (too_large if facts.device_bytes else "") + _where(mode, facts))
    raise MemoryError(_does_not_fit("; ".join(lacks.values())))


def _why_replicated(facts: Facts) -> str:
    """Return why each rank gets its own copy, as a clause; empty if copies do not fit."""
    processes, model_bytes = facts.local_world_size, facts.layer_bytes + facts.other_bytes
    if facts.device_bytes is not None:
        fraction = _MOST_OF_DEVICE if _why_not_sharded(facts) else _DEVICE_FRACTION
        fits = model_bytes <= fraction * facts.device_bytes
        return f"{_size(model_bytes)} of weights fit {_device(facts)}" if fits else ""
    if processes == 1:
        return "one process on this machine"
    fits = processes * model_bytes <= _HOST_FRACTION * facts.host_bytes
    return (
        f"{processes} copies of {_size(model_bytes)} fit the {_size(facts.host_bytes)} of this machine" if fits else ""
    )


def _why_not_sharded(facts: Facts) -> str:
    if facts.device_bytes is None:
        return "there are no GPUs whose memory could hold parts of the model; 'host' shares the memory of the machine"
    if facts.local_world_size == 1:
        return "one process has one GPU; 'host' keeps the layers in the memory of the machine"
    return facts.no_peer_copies


def _what_lacks(mode: str, facts: Facts, fraction: float) -> str:
    """Return what does not fit, with the layers stored once and `fraction` of a GPU for weights; empty if all does."""
    processes, on_gpu = facts.local_world_size, facts.device_bytes is not None
    others = 0 if on_gpu else processes * facts.other_bytes
    if mode == "host" and facts.layer_bytes + others > facts.host_bytes:
        added = f" and {processes} x {_size(facts.other_bytes)} of other weights" if others else ""
        return (
            f"{_size(facts.layer_bytes)} of decoder layers once{added} are {_size(facts.layer_bytes + others)}, and the machine "
            f"has {_size(facts.host_bytes)}"
        )
    part = facts.layer_bytes / processes if mode == "sharded" else 0
    slots = FETCHED_LAYERS * facts.layer_bytes / max(1, facts.layers)
    needed = part + slots + facts.other_bytes
    if on_gpu and needed > fraction * facts.device_bytes:
        parts = f"{_size(part)} of decoder layers, " if part else ""
        return (
            f"{parts}{_size(slots)} for {FETCHED_LAYERS} layers that are copied and {_size(facts.other_bytes)} of other weights "
            f"are {_size(needed)} on each GPU, of {_device(facts)}"
        )
    return ""


def _does_not_fit(why: str) -> str:
    return (
        f"The model does not fit this machine: {why}. Use a smaller model or type, 4-bit weights, fewer processes on a CPU, "
        "more GPUs, or a machine with more memory."
    )


def _where(mode: str, facts: Facts) -> str:
    if mode == "sharded":
        part = _size(facts.layer_bytes / facts.local_world_size)
        return f"{part} of decoder layers on each of {facts.local_world_size} GPUs, which copy the others' before they run"
    return f"one copy of {_size(facts.layer_bytes)} of decoder layers for all processes of this machine"


def _device(facts: Facts) -> str:
    return _size(facts.device_bytes or 0)


def host_bytes() -> int:
    """Return the memory of this machine, or the limit of the container."""
    total = psutil.virtual_memory().total
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def device_bytes() -> int:
    """Return the memory of the smallest GPU that this process sees, or what PyTorch may use of it."""
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return int(min(sizes) * torch.cuda.get_per_process_memory_fraction())


def _size(nbytes: float) -> str:
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / 2**20:.1f} MiB"
