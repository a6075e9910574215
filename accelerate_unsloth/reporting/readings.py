"""What the ranks measured: one reading per rank and logging step, and their sum for the log."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

_ADDED = ("tokens", "wall_s", "own_s", "steps", "alloc_retries")
_PEAKS = ("peak_gib", "reserved_gib", "host_gib")


@dataclass(slots=True)
class RankReading:
    """What one rank did since the last logging step. GPU memory is as PyTorch counts it, and 0 without a GPU."""

    tokens: int = 0  # of its micro-batches
    wall_s: float = 0.0  # seconds of its steps, waiting for others included
    own_s: float = 0.0  # seconds of its own forwards and backwards
    steps: int = 0  # optimizer steps
    peak_gib: float = 0.0  # GPU memory in use, the most
    reserved_gib: float = 0.0  # GPU memory reserved, the most
    host_gib: float = 0.0  # memory of its process
    device: str = "CPU"  # or the name of its GPU
    alloc_retries: int = 0  # how often PyTorch found the GPU full, emptied its cache and tried again
    reachable_gib: float = 0.0  # GPU memory that PyTorch holds or that is free
    host_available_gib: float = 0.0  # memory of its node
    host_total_gib: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of its own work per step."""
        return self.own_s / max(1, self.steps)

    @property
    def rest_s(self) -> float:
        """Seconds per step for everything else: waiting for others, data, reduction and optimizer."""
        return max(0.0, self.wall_s - self.own_s) / max(1, self.steps)


@dataclass(frozen=True)
class Interval:
    """The readings of all ranks, in rank order, up to an optimizer step."""

    step: int
    ranks: Sequence[RankReading]


def totals(history: Sequence[Interval]) -> list[RankReading]:
    """Return each rank's readings as one: work is added, peaks are kept, the rest is the last reading's."""
    return [
        replace(
            readings[-1],
            **{name: sum(getattr(reading, name) for reading in readings) for name in _ADDED},
            **{name: max(getattr(reading, name) for reading in readings) for name in _PEAKS},
        )
        for readings in zip(*(interval.ranks for interval in history), strict=True)
    ]


def imbalance(tokens: Sequence[int]) -> float:
    """Return the most tokens of a rank over the mean of the ranks."""
    return max(tokens) * len(tokens) / max(1, sum(tokens))


def summary(ranks: Sequence[RankReading]) -> dict[str, float | int]:
    """
    Return the log entries of all ranks together, by their readings in rank order.

    Returns:
        `dict`: `tokens_per_second` of all ranks, `token_imbalance` (see [`imbalance`]), `slowest_rank` with
        `slowest_rank_step_s` and `fastest_rank_step_s` (own work per step), `peak_memory_gib` and `reserved_memory_gib` (of
        the rank with the most), and `host_memory_gib` of all ranks.
    """
    tokens, wall_s = sum(rank.tokens for rank in ranks), max(rank.wall_s for rank in ranks)
    step_s = [rank.step_s for rank in ranks]
    logs = {
        "tokens_per_second": round(tokens / wall_s, 1) if wall_s else 0.0,
        "token_imbalance": round(imbalance([rank.tokens for rank in ranks]), 4),
        "slowest_rank": step_s.index(max(step_s)),
        "slowest_rank_step_s": round(max(step_s), 4),
        "fastest_rank_step_s": round(min(step_s), 4),
        "host_memory_gib": round(sum(rank.host_gib for rank in ranks), 2),
    }
    if any(rank.peak_gib for rank in ranks):
        logs["peak_memory_gib"] = round(max(rank.peak_gib for rank in ranks), 2)
        logs["reserved_memory_gib"] = round(max(rank.reserved_gib for rank in ranks), 2)
    return logs
