"""What the ranks measured: one reading each, their sum for the log, and the history that the report is drawn from."""

from dataclasses import dataclass, field


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
        device (`str`): Name of its GPU, or `"CPU"`.
        alloc_retries (`int`): How often PyTorch found its GPU full, emptied its cache and tried again.
        reachable_gib (`float`): What PyTorch holds of its GPU and what nobody holds; 0 without one.
        host_available_gib (`float`), host_total_gib (`float`): Of its machine.
    """

    tokens: int = 0
    wall_s: float = 0.0
    own_s: float = 0.0
    steps: int = 0
    peak_gib: float = 0.0
    reserved_gib: float = 0.0
    host_gib: float = 0.0
    device: str = "CPU"
    alloc_retries: int = 0
    reachable_gib: float = 0.0
    host_available_gib: float = 0.0
    host_total_gib: float = 0.0

    @property
    def step_s(self) -> float:
        """Its own work a step."""
        return self.own_s / max(1, self.steps)

    def then(self, later: "RankReading") -> "RankReading":
        """This reading and the one after it, as one: work is added, peaks are kept, the rest is the later one's."""
        return RankReading(
            tokens=self.tokens + later.tokens,
            wall_s=self.wall_s + later.wall_s,
            own_s=self.own_s + later.own_s,
            steps=self.steps + later.steps,
            peak_gib=max(self.peak_gib, later.peak_gib),
            reserved_gib=max(self.reserved_gib, later.reserved_gib),
            host_gib=max(self.host_gib, later.host_gib),
            device=later.device,
            alloc_retries=self.alloc_retries + later.alloc_retries,
            reachable_gib=later.reachable_gib,
            host_available_gib=later.host_available_gib,
            host_total_gib=later.host_total_gib,
        )


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
    >>> from accelerate_unsloth.reporting.readings import RankReading, summary
    >>> summary([RankReading(300, 2.0, 1.8, 2), RankReading(100, 2.0, 0.6, 2)])["token_imbalance"]
    1.5
    ```
    """
    tokens, wall_s = sum(rank.tokens for rank in ranks), max(rank.wall_s for rank in ranks)
    step_s = [rank.step_s for rank in ranks]
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


@dataclass(frozen=True)
class Interval:
    """The readings of all ranks, in rank order, up to an optimizer step."""

    step: int
    ranks: tuple[RankReading, ...]

    def then(self, later: "Interval") -> "Interval":
        return Interval(later.step, tuple(one.then(other) for one, other in zip(self.ranks, later.ranks, strict=True)))


@dataclass
class History:
    """
    All readings of a run in bounded memory: beyond `capacity` intervals, neighbours are put together.

    Args:
        capacity (`int`, *optional*, defaults to `512`): Most intervals that are kept; an even number.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.readings import History, RankReading
    >>> history = History(capacity=2)
    >>> for step in (1, 2, 3):
    ...     history.add(step, [RankReading(tokens=10)])
    >>> [(interval.step, interval.ranks[0].tokens) for interval in history.intervals]
    [(2, 20), (3, 10)]
    ```
    """

    capacity: int = 512
    intervals: list[Interval] = field(default_factory=list)
    _logs_each: int = 1  # logging steps that an interval takes up
    _logs_in_last: int = 0

    def add(self, step: int, ranks: list[RankReading]) -> None:
        """Take up what the ranks did until `step`."""
        new = Interval(step, tuple(ranks))
        if self.intervals and self._logs_in_last < self._logs_each:
            self.intervals[-1] = self.intervals[-1].then(new)
            self._logs_in_last += 1
            return
        if len(self.intervals) == self.capacity:
            pairs = zip(self.intervals[::2], self.intervals[1::2], strict=True)
            self.intervals = [one.then(other) for one, other in pairs]
            self._logs_each *= 2
        self.intervals.append(new)
        self._logs_in_last = 1

    def totals(self) -> tuple[RankReading, ...]:
        """Each rank's readings as one; empty before the first."""
        total = None
        for interval in self.intervals:
            total = interval if total is None else total.then(interval)
        return () if total is None else total.ranks
