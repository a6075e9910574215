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
_MOST = 0.9  # of either, where nothing else would leave more room

VARIABLE = "ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    layers: tuple[int, ...]  # bytes of the frozen weights of each decoder layer that can be in one place
    other_bytes: int  # embeddings, head, constants of quantization and the rest, which every rank holds
    local_world_size: int
    host_bytes: int  # memory of this machine, or of the container
    device_bytes: int | None = None  # memory of the smallest GPU of this machine's processes; None on a CPU
    cannot_share: str = ""  # why the layers cannot be shared, as one clause
    no_peer_copies: str = ""  # why the GPUs cannot copy from one another, as one clause

    @property
    def layer_bytes(self) -> int:
        return sum(self.layers)

    @property
    def model_bytes(self) -> int:
        return self.layer_bytes + self.other_bytes

    @property
    def largest_part(self) -> int:
        """Bytes of the layers of the GPU that holds most."""
        parts = [0] * self.local_world_size
        for index, nbytes in enumerate(self.layers):
            parts[owner(index, self.local_world_size)] += nbytes
        return max(parts)


@dataclass(frozen=True)
class PlacementChoice:
    mode: str  # "replicated" | "sharded" | "host"
    reason: str  # one clause, shown in the start-up table


def owner(layer: int, processes: int) -> int:
    """
    Return which of a machine's processes holds a layer: the next one for each layer, one further in each round.

    So no process gets all layers of a kind where every second or fourth layer has experts.

    Example:

    ```python
    >>> from accelerate_unsloth.weights.placement import owner
    >>> [owner(layer, 2) for layer in range(6)]
    [0, 1, 1, 0, 0, 1]
    ```
    """
    return (layer + layer // processes) % processes


def resolve(requested: str, facts: Facts) -> PlacementChoice:
    """
    Choose where the frozen weights live; `requested` is the plugin's option.

    Raises:
        ValueError: for a placement that is not possible here.
        MemoryError: if the memory does not hold the model, with the arithmetic.

    Example:

    ```python
    >>> from accelerate_unsloth.weights.placement import Facts, resolve
    >>> facts = Facts(layers=(2**30,) * 30, other_bytes=2**30, local_world_size=4, host_bytes=64 * 2**30)
    >>> resolve("auto", facts).mode
    'host'
    ```
    """
    if requested == "replicated":
        return PlacementChoice("replicated", "asked for")
    impossible = {"host": facts.cannot_share, "sharded": facts.cannot_share or _why_not_sharded(facts)}
    if requested != "auto":
        if why := impossible[requested]:
            other = f"{VARIABLE}=host" if not facts.cannot_share else f"{VARIABLE}=replicated"
            raise ValueError(f"frozen_weights={requested!r} is not possible: {why}. Set {other}.")
        if lacks := _what_lacks(requested, facts, _MOST):
            raise MemoryError(_does_not_fit(lacks))
        return PlacementChoice(requested, f"asked for; {_where(requested, facts)}")
    if why := facts.cannot_share or _why_replicated(facts):
        return PlacementChoice("replicated", why)
    return _shared(facts, impossible["sharded"])


def _shared(facts: Facts, not_sharded: str) -> PlacementChoice:
    """Choose among the placements of a model whose copies leave no room."""
    on_gpu, lacks = facts.device_bytes is not None, []
    order = [("sharded", _DEVICE_FRACTION), ("host", _MOST), ("sharded", _MOST)]
    for mode, fraction in order:
        if mode == "sharded" and not_sharded:
            continue
        if what := _what_lacks(mode, facts, fraction):
            lacks.append(what)
            continue
        why = f"{_size(facts.model_bytes)} of weights leave no room on {_size(facts.device_bytes)}; " if on_gpu else ""
        instead = f" ({facts.no_peer_copies})" if facts.no_peer_copies else ""
        return PlacementChoice(mode, why + _where(mode, facts) + instead)
    if on_gpu and facts.model_bytes <= _MOST * facts.device_bytes:
        return PlacementChoice("replicated", f"{lacks[-1]}, while all weights fit")
    raise MemoryError(_does_not_fit("; ".join(dict.fromkeys(lacks))))


def _why_replicated(facts: Facts) -> str:
    """Return why each rank gets its own copy, as a clause; empty if copies leave no room."""
    processes, model_bytes = facts.local_world_size, facts.model_bytes
    if facts.device_bytes is not None:
        fraction = _MOST if _why_not_sharded(facts) else _DEVICE_FRACTION
        fits = model_bytes <= fraction * facts.device_bytes
        return f"{_size(model_bytes)} of weights fit {_size(facts.device_bytes)}" if fits else ""
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
    if mode == "host" and facts.layer_bytes + others > _MOST * facts.host_bytes:
        added = f" and {processes} x {_size(facts.other_bytes)} of other weights" if others else ""
        return (
            f"{_size(facts.layer_bytes)} of decoder layers once{added} are {_size(facts.layer_bytes + others)}, and the machine "
            f"has {_size(facts.host_bytes)}, {_MOST:g} of it for weights"
        )
    part = facts.largest_part if mode == "sharded" else 0
    slots = FETCHED_LAYERS * max(facts.layers, default=0)
    needed = part + slots + facts.other_bytes
    if on_gpu and needed > fraction * facts.device_bytes:
        parts = f"{_size(part)} of decoder layers, " if part else ""
        return (
            f"{parts}{_size(slots)} for {FETCHED_LAYERS} layers that are copied and {_size(facts.other_bytes)} of other weights "
            f"are {_size(needed)} on each GPU, which has {_size(facts.device_bytes)}, {fraction:g} of it for weights"
        )
    return ""


def _does_not_fit(why: str) -> str:
    return (
        f"The model does not fit this machine: {why}. Use a smaller model or type, 4-bit weights, fewer processes on a CPU, "
        "more GPUs, or a machine with more memory."
    )


def _where(mode: str, facts: Facts) -> str:
    if mode == "sharded":
        count, part = facts.local_world_size, _size(facts.largest_part)
        return f"at most {part} of decoder layers on each of {count} GPUs, which copy the others' before they run"
    return f"one copy of {_size(facts.layer_bytes)} of decoder layers for all processes of this machine"


def host_bytes() -> int:
    """Return the memory of this machine, or the limit of the container, without what earlier models have pinned of it."""
    from .copying import pinned_bytes

    total = psutil.virtual_memory().total
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return (min(total, int(limit)) if limit.isdigit() else total) - pinned_bytes()


def device_bytes(local_world_size: int) -> int:
    """
    Return the memory of the smallest GPU of this machine's processes that this one sees, or what PyTorch may use of it.

    What earlier models hold beside PyTorch does not count; a limit of PyTorch's was lowered for it.
    """
    import torch

    from .cuda_ipc import held_bytes

    alone = local_world_size == 1 or torch.cuda.device_count() < local_world_size
    used = [torch.cuda.current_device()] if alone else range(local_world_size)
    smallest = min(torch.cuda.get_device_properties(index).total_memory for index in used)
    return int(min(smallest * torch.cuda.get_per_process_memory_fraction(), smallest - held_bytes()))


def _size(nbytes: float) -> str:
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / 2**20:.1f} MiB"
