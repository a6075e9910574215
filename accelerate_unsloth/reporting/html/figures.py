"""The arithmetic of the report: one sentence, where the time went, what each rank did."""

import math
from dataclasses import dataclass

from .record import Record


@dataclass(frozen=True)
class Share:
    """A part of the time."""

    name: str
    seconds: float
    note: str


def duration(seconds: float) -> str:
    """
    A duration in the two units that matter.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.html.figures import duration
    >>> duration(4.26), duration(192), duration(7500)
    ('4.3 s', '3 min 12 s', '2 h 05 min')
    ```
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{round(whole / 60) // 60} h {round(whole / 60) % 60:02} min"


def number(value) -> str:
    """A number as people read it: four digits that count, thousands with commas."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.2e}"


def devices(record: Record) -> str:
    """Such as `2 x NVIDIA H200`, or `2 CPU processes`."""
    names = [reading.device for reading in record.history.totals()] or [record.device] * record.processes
    return " and ".join(_devices(name, names.count(name)) for name in dict.fromkeys(names))


def _devices(name: str, count: int) -> str:
    if name.lower() == "cpu":
        return f"{count} CPU process{'es' * (count > 1)}"
    return f"{count} x {name}" if count > 1 else name


def final_loss(record: Record) -> float | None:
    """The last loss that was logged; else the mean that the Trainer gives at the end."""
    logged = record.logged("loss") or record.logged("train_loss")
    return logged[-1][1] if logged else None


def headline(record: Record) -> str:
    """What ran, on what, how long, and what came out."""
    done = record.steps - record.began_at_step
    steps = f"{done:,} step{'s' * (done != 1)}"
    ran = f"{record.model_name}: {steps} on {devices(record)} in {duration(record.spent.total_s)}"
    losses = record.logged("loss")
    if len(losses) > 1:
        return f"{ran}, loss from {number(losses[0][1])} to {number(losses[-1][1])}"
    return ran if final_loss(record) is None else f"{ran}, loss {number(final_loss(record))}"


def ending(record: Record) -> str:
    """How it ended, and what to know before reading on."""
    at = f"step {record.steps:,} of {record.max_steps:,}"
    words = (
        f"Ended by itself at {at}, before its last step." if record.steps < record.max_steps else f"Finished at {at}."
    )
    if record.stopped:
        words = f"Stopped by a signal at {at}; resume_from_checkpoint='auto' goes on from there."
    if record.began_at_step:
        words += (
            f" It was resumed at step {record.began_at_step:,}: losses are those of the whole run, while times and the "
            "figures of single ranks are of this process's steps alone."
        )
    return words


def shares(record: Record) -> list[Share]:
    """
    Where the time of `train()` went. Readings of all ranks give the steps' inside, rank 0's clock the rest.

    Returns:
        `list[Share]`: that add up to the whole; without readings, steps are one share with the rest.
    """
    spent = record.spent
    parts = [
        Share("Preparation", spent.preparation_s, "data loaders, planning, trying micro-batches, loading a checkpoint")
    ]
    parts += _shares_of_steps(record)
    if spent.unlogged_s and record.history.intervals:
        parts.append(
            Share("Steps after the last log", spent.unlogged_s, "not split up, because nothing was exchanged")
        )
    parts.append(Share("Evaluation", spent.evaluation_s, "between steps"))
    parts.append(Share("Checkpoints", spent.checkpoints_s, "writing, checksums, flushing to disk"))
    rest = max(0.0, spent.total_s - sum(part.seconds for part in parts))
    inside = "logging, callbacks, ends of epochs"
    parts.append(
        Share("The rest", rest, inside)
        if record.history.intervals
        else Share("Steps, and the rest", rest, "not split up, because steps were not monitored")
    )
    return [part for part in parts if part.seconds > 0]


def _shares_of_steps(record: Record) -> list[Share]:
    own = longest = wall = 0.0
    for interval in record.history.intervals:
        own += sum(rank.own_s for rank in interval.ranks) / len(interval.ranks)
        longest += max(rank.own_s for rank in interval.ranks)
        wall += interval.ranks[0].wall_s
    return [
        Share("Forward and backward", own, "mean of the ranks"),
        Share("Waiting for the slowest rank", longest - own, "its own work over the mean, between two logs"),
        Share("The rest of steps", max(0.0, wall - longest), "fetching data, reduction, optimizer"),
    ]


@dataclass(frozen=True)
class RankFigures:
    """One rank over the whole of this process's life; memory in GiB at its highest."""

    rank: int
    device: str
    tokens: int
    step_s: float
    waiting_s: float  # a step: for others, data, reduction and optimizer
    peak_gib: float
    reserved_gib: float
    reachable_gib: float
    host_gib: float


def ranks(record: Record) -> list[RankFigures]:
    return [
        RankFigures(
            rank=rank,
            device=total.device,
            tokens=total.tokens,
            step_s=total.step_s,
            waiting_s=max(0.0, total.wall_s - total.own_s) / max(1, total.steps),
            peak_gib=total.peak_gib,
            reserved_gib=total.reserved_gib,
            reachable_gib=total.reachable_gib,
            host_gib=total.host_gib,
        )
        for rank, total in enumerate(record.history.totals())
    ]


def tokens_per_second(record: Record) -> float | None:
    """Of all ranks, over all monitored steps."""
    wall_s = sum(interval.ranks[0].wall_s for interval in record.history.intervals)
    return sum(total.tokens for total in record.history.totals()) / wall_s if wall_s else None


def imbalance(record: Record) -> float | None:
    """Mean over the intervals: most tokens of a rank over the mean of the ranks."""
    found = [
        max(rank.tokens for rank in interval.ranks) * len(interval.ranks) / sum(rank.tokens for rank in interval.ranks)
        for interval in record.history.intervals
        if any(rank.tokens for rank in interval.ranks)
    ]
    return sum(found) / len(found) if found else None


def thinned(points: list[tuple[int, float]], most: int) -> tuple[list[tuple[int, float]], int]:
    """
    Points few enough to be drawn.

    Args:
        points (`list[tuple[int, float]]`): Step and value.
        most (`int`): Points that may be left.

    Returns:
        `tuple`: the points, and how many neighbours each of them is the mean of, at its last step.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.html.figures import thinned
    >>> thinned([(1, 2.0), (2, 4.0), (3, 6.0)], most=2)
    ([(2, 3.0), (3, 6.0)], 2)
    ```
    """
    each = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups], each
