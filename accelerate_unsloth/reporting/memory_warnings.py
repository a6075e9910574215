"""
Warn of memory that is about to run out, from the readings that logging steps exchange anyway.

Rank 0 warns for all ranks and names them, because one rank that runs out of memory ends or slows all of them.
"""

from dataclasses import dataclass, field

from .readings import RankReading

# Planning leaves a tenth of the GPU free; a peak beyond this is close to what one longer micro-batch takes.
_GPU_FULL = 0.95
# Below this share Linux drops file caches that it needs again, and soon kills the next process that asks for memory.
_HOST_LOW = 0.05

_GPU_REMEDY = (
    "Lower memory_fraction or micro_batch_tokens (per_device_train_batch_size under micro_batch='fixed'), or set "
    "gradient_checkpointing='unsloth'."
)
_HOST_REMEDY = "Use a lower dataloader_num_workers, or fewer processes on that node."


@dataclass(frozen=True)
class Pressure:
    kind: str  # "gpu retries" | "gpu full" | "host"
    ranks: tuple[int, ...]
    message: str


def find(ranks: list[RankReading]) -> list[Pressure]:
    """Return which memory is about to run out, by the readings of all ranks in rank order: at most one of each kind."""
    retried = [rank for rank, reading in enumerate(ranks) if reading.alloc_retries > 0]
    full = [rank for rank, reading in enumerate(ranks) if _is_gpu_full(reading)]
    low = [rank for rank, reading in enumerate(ranks) if _is_host_low(reading)]
    found = []
    if retried:
        count = sum(ranks[rank].alloc_retries for rank in retried)
        message = (
            f"The GPU memory of rank {_names(retried)} ran full {count} time(s) since the last log. PyTorch emptied "
            f"its cache and tried again, which takes time and may fail next time. {_GPU_REMEDY}"
        )
        found.append(Pressure("gpu retries", tuple(retried), message))
    if full:
        worst = max((ranks[rank] for rank in full), key=lambda reading: reading.peak_gib / reading.reachable_gib)
        message = (
            f"The GPU memory of rank {_names(full)} is nearly full: at the peak {worst.peak_gib:.2f} of "
            f"{worst.reachable_gib:.2f} GiB that PyTorch can reach were in use. {_GPU_REMEDY}"
        )
        found.append(Pressure("gpu full", tuple(full), message))
    if low:
        worst = min((ranks[rank] for rank in low), key=lambda reading: reading.host_available_gib)
        message = (
            f"The node of rank {_names(low)} is nearly out of memory: {worst.host_available_gib:.2f} of "
            f"{worst.host_total_gib:.2f} GiB are left, and the kernel kills a process at 0. {_HOST_REMEDY}"
        )
        found.append(Pressure("host", tuple(low), message))
    return found


def _is_gpu_full(reading: RankReading) -> bool:
    """Compare with what PyTorch can reach: its own cache is reachable, the memory of other processes is not."""
    return reading.reachable_gib > 0 and reading.peak_gib > _GPU_FULL * reading.reachable_gib


def _is_host_low(reading: RankReading) -> bool:
    return reading.host_available_gib < _HOST_LOW * reading.host_total_gib


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


@dataclass
class PressureWatch:
    """Warns of each kind of pressure once per training; `messages` keeps the warnings by kind."""

    messages: dict[str, str] = field(default_factory=dict)

    def new_warnings(self, ranks: list[RankReading]) -> list[str]:
        """Return the messages of the kinds that were not reported before."""
        fresh = {found.kind: found.message for found in find(ranks) if found.kind not in self.messages}
        self.messages |= fresh
        return list(fresh.values())
