"""
Where the frozen weights of decoder layers live.

`replicated`: every rank holds all of them. `host`: one copy per node in shared memory. Every rank chooses for itself, from what
is the same on all ranks of a node, so that a script may load a replicated model on one rank only.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

_GIB = 2**30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

# Part of the machine's memory that weights may take; libraries, data and activations need the rest. On a GPU only weights that
# are larger than all of it are shared without being asked for, as long as that is experimental there.
_HOST_FRACTION, _DEVICE_FRACTION = 0.7, 1.0

VARIABLE = "ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    layer_bytes: int  # frozen weights of all decoder layers, as loaded
    other_bytes: int  # embeddings, head and the rest, which every rank holds
    local_world_size: int
    host_bytes: int  # memory of this machine, or of the container
    device_bytes: int | None = None  # memory of the smallest GPU of this process's machine; None on a CPU
    cannot_share: str = ""  # why the layers cannot be shared, as one clause


@dataclass(frozen=True)
class PlacementChoice:
    mode: str  # "replicated" | "host"
    reason: str  # one clause, shown in the start-up table


def resolve(requested: str, facts: Facts) -> PlacementChoice:
    """
    Choose where the frozen weights live; `requested` is the plugin's option.

    Raises:
        ValueError: for a placement that is not possible here.
        MemoryError: if the memory of the machine does not hold the model, with the arithmetic.

    Example:

    ```python
    >>> from accelerate_unsloth.weights.placement import Facts, resolve
    >>> resolve("auto", Facts(layer_bytes=30 * 2**30, other_bytes=2**30, local_world_size=4, host_bytes=64 * 2**30)).mode
    'host'
    ```
    """
    if requested == "replicated":
        return PlacementChoice("replicated", "asked for")
    if why := _why_impossible(requested, facts):
        if requested != "auto":
            raise ValueError(f"frozen_weights={requested!r} is not possible: {why}. Set {VARIABLE}=replicated.")
        return PlacementChoice("replicated", why)
    processes, model_bytes = facts.local_world_size, facts.layer_bytes + facts.other_bytes
    if requested == "auto" and (why := _why_replicated(model_bytes, facts)):
        return PlacementChoice("replicated", why)
    needed = facts.layer_bytes + processes * facts.other_bytes
    if needed > facts.host_bytes:
        raise MemoryError(
            f"The model does not fit this machine: {_size(facts.layer_bytes)} of decoder layers once and {processes} x "
            f"{_size(facts.other_bytes)} of other weights are {_size(needed)}, and the machine has "
            f"{_size(facts.host_bytes)}. Use a smaller model or type, fewer processes, or a machine with more memory."
        )
    shared = f"one copy of {_size(facts.layer_bytes)} of decoder layers for all processes of this machine"
    if requested == "host":
        return PlacementChoice("host", f"asked for; {shared}")
    if facts.device_bytes is not None:
        shared = f"{_size(model_bytes)} of weights leave no room on {_size(facts.device_bytes)}; {shared}"
    return PlacementChoice("host", shared)


def _why_replicated(model_bytes: int, facts: Facts) -> str:
    """Return why each rank gets its own copy, as a clause; empty if copies do not fit."""
    processes = facts.local_world_size
    if facts.device_bytes is not None:
        fits = model_bytes <= _DEVICE_FRACTION * facts.device_bytes
        return f"{_size(model_bytes)} of weights fit {_size(facts.device_bytes)}" if fits else ""
    if processes == 1:
        return "one process on this machine"
    fits = processes * model_bytes <= _HOST_FRACTION * facts.host_bytes
    return (
        f"{processes} copies of {_size(model_bytes)} fit the {_size(facts.host_bytes)} of this machine" if fits else ""
    )


def _why_impossible(requested: str, facts: Facts) -> str:
    if requested == "sharded":
        return (
            "layers in the memory of other GPUs are not supported yet; 'host' shares them in the memory of the machine"
        )
    return facts.cannot_share


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
