"""
What each logging step says about speed and memory, over all ranks.

A rank adds up what it has done since the last logging step, without waiting for its GPU; ranks exchange these sums only
where they log.
"""

import time
from dataclasses import asdict, dataclass

import psutil
import torch
from transformers import TrainerCallback

from .channel import channel

_GIB = 2**30


@dataclass
class RankReading:
    """
    What one rank did since the last logging step.

    Args:
        tokens (`int`): Tokens of its micro-batches.
        wall_s (`float`): Seconds of its steps, waiting for others included.
        own_s (`float`): Seconds of its own forwards and backwards.
        steps (`int`): Optimizer steps.
        peak_gib (`float`), reserved_gib (`float`): Of its GPU, as PyTorch counts; 0 without one.
        host_gib (`float`): Memory of its process.
    """

    tokens: int = 0
    wall_s: float = 0.0
    own_s: float = 0.0
    steps: int = 0
    peak_gib: float = 0.0
    reserved_gib: float = 0.0
    host_gib: float = 0.0


def summary(ranks: list[RankReading]) -> dict[str, float | int]:
    """
    The log entries of all ranks together.

    Args:
        ranks (`list[RankReading]`): Of each rank, in rank order.

    Returns:
        `dict`: `tokens_per_second` of all ranks, `token_imbalance` (most tokens of a rank over the mean),
        `slowest_rank` with `slowest_rank_step_s` and `fastest_rank_step_s` (own work a step), `peak_memory_gib` and
        `reserved_memory_gib` (of the rank with the most), and `host_memory_gib` of all ranks.

    Example:

    ```python
    >>> from accelerate_unsloth.monitor import RankReading, summary
    >>> summary([RankReading(300, 2.0, 1.8, 2), RankReading(100, 2.0, 0.6, 2)])["token_imbalance"]
    1.5
    ```
    """
    tokens, wall_s = sum(rank.tokens for rank in ranks), max(rank.wall_s for rank in ranks)
    step_s = [rank.own_s / max(1, rank.steps) for rank in ranks]
    logs = {
        "tokens_per_second": round(tokens / wall_s, 1) if wall_s else 0.0,
        "token_imbalance": round(max(rank.tokens for rank in ranks) * len(ranks) / max(1, tokens), 4),
        "slowest_rank": step_s.index(max(step_s)),
        "slowest_rank_step_s": round(max(step_s), 4),
        "fastest_rank_step_s": round(min(step_s), 4),
        "host_memory_gib": round(sum(rank.host_gib for rank in ranks), 2),
    }
    if any(rank.peak_gib for rank in ranks):
        logs["peak_memory_gib"] = round(max(rank.peak_gib for rank in ranks), 2)
        logs["reserved_memory_gib"] = round(max(rank.reserved_gib for rank in ranks), 2)
    return logs


class Monitor(TrainerCallback):
    """
    Times this rank's steps.

    Args:
        device (`torch.device`): Where this rank computes.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._since_log = RankReading()
        self._step_began_s = self._own_began = None

    def begin_step(self) -> None:
        """Before the batches of a step are fetched."""
        self._step_began_s = time.perf_counter()

    def begin_work(self) -> None:
        """Before the first forward of a step."""
        if self._own_began is None:
            self._own_began = self._now()

    def end_work(self, tokens: int) -> "_Moment":
        """After the last backward of a step, before ranks meet."""
        self._since_log.tokens += tokens
        return self._now()

    def add_work(self, ended: "_Moment") -> None:
        """After ranks have met, when the GPU has passed `ended` anyway."""
        if self._own_began is not None:
            self._since_log.own_s += ended.since(self._own_began)
        self._own_began = None

    def on_step_end(self, args, state, control, **kwargs):
        if self._step_began_s is not None:
            self._since_log.wall_s += time.perf_counter() - self._step_began_s
            self._since_log.steps += 1

    def read(self) -> dict[str, float | int]:
        """The log entries since the last call; all ranks come here together."""
        reading, self._since_log = self._since_log, RankReading()
        reading.host_gib = psutil.Process().memory_info().rss / _GIB
        if self._cuda:
            reading.peak_gib = torch.cuda.max_memory_allocated() / _GIB
            reading.reserved_gib = torch.cuda.max_memory_reserved() / _GIB
        return summary([RankReading(**rank) for rank in channel().gather("monitor", asdict(reading))])

    def _now(self) -> "_Moment":
        return _Moment(self._cuda)


class _Moment:
    """A point in time: of the GPU's work where there is one, which is not waited for."""

    def __init__(self, cuda: bool):
        self._s, self._event = time.perf_counter(), None
        if cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: "_Moment") -> float:
        if self._event is None:
            return self._s - earlier._s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
