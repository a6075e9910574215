"""The arithmetic of the report: one sentence, where the time went, the table of all logged values."""

import math
from typing import NamedTuple

from .. import readings

_LOG_ROWS = 500
_LOG_COLUMNS = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "num_tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "token_imbalance": "imbalance",
    "slowest_rank": "slowest rank",
    "slowest_rank_step_s": "its step, s",
    "fastest_rank_step_s": "fastest, s",
    "peak_memory_gib": "GPU peak, GiB",
    "host_memory_gib": "host, GiB",
}


class Share(NamedTuple):
    """A part of the time."""

    name: str
    seconds: float
    note: str


def duration(seconds: float) -> str:
    """
    Return a duration in its two largest units.

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
    """Return a number with four significant digits and commas between thousands; other values as text."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.2e}"


def _devices(record) -> str:
    """Return, for example, `2 x NVIDIA H200` or `2 CPU processes`."""

    def several(name: str, count: int) -> str:
        if name.lower() == "cpu":
            return f"{count} CPU process{'es' * (count > 1)}"
        return f"{count} x {name}" if count > 1 else name

    names = [rank.device for rank in record.ranks] or [record.device] * record.processes
    return " and ".join(several(name, names.count(name)) for name in dict.fromkeys(names))


def final_loss(record) -> float | None:
    """Return the last logged loss, else the mean that the Trainer gives at the end."""
    logged = record.logged("loss") or record.logged("train_loss")
    return logged[-1][1] if logged else None


def headline(record) -> str:
    """Return what ran, on what, how long, and the loss."""
    done = record.steps - record.began_at_step
    steps = f"{done:,} step{'s' * (done != 1)}"
    ran = f"{record.model_name}: {steps} on {_devices(record)} in {duration(record.spent.total_s)}"
    losses = record.logged("loss")
    if len(losses) > 1:
        return f"{ran}, loss from {number(losses[0][1])} to {number(losses[-1][1])}"
    return ran if final_loss(record) is None else f"{ran}, loss {number(final_loss(record))}"


def shares(record) -> list[Share]:
    """Return where the time of `train()` went: inside steps by the readings of all ranks, else by rank 0's clock."""
    spent, monitored = record.spent, bool(record.history)
    parts = [
        Share(
            "Preparation", spent.preparation_s, "data loaders, planning, probing micro-batches, loading a checkpoint"
        )
    ]
    if monitored:
        parts += _shares_of_steps(record)
        parts.append(
            Share("Steps after the last log", spent.unlogged_s, "not split up, because no readings were exchanged")
        )
    parts.append(Share("Evaluation", spent.evaluation_s, "between steps"))
    parts.append(Share("Checkpoints", spent.checkpoints_s, "writing, checksums, flushing to disk"))
    rest = max(0.0, spent.total_s - sum(part.seconds for part in parts))
    if monitored:
        parts.append(Share("The rest", rest, "logging, callbacks, ends of epochs"))
    else:
        parts.append(Share("Steps, and the rest", rest, "not split up, because steps were not monitored"))
    return [part for part in parts if part.seconds > 0]


def _shares_of_steps(record) -> list[Share]:
    own = longest = wall = 0.0
    for interval in record.history:
        own += sum(rank.own_s for rank in interval.ranks) / len(interval.ranks)
        longest += max(rank.own_s for rank in interval.ranks)
        wall += interval.ranks[0].wall_s
    return [
        Share("Forward and backward", own, "mean of the ranks"),
        Share(
            "Waiting for the slowest rank", longest - own, "the most work of a rank minus the mean, between two logs"
        ),
        Share("The rest of steps", max(0.0, wall - longest), "fetching data, reduction, optimizer"),
    ]


def tokens_per_second(record) -> float | None:
    """Return the tokens of all ranks per second of monitored steps."""
    wall_s = sum(interval.ranks[0].wall_s for interval in record.history)
    return sum(rank.tokens for rank in record.ranks) / wall_s if wall_s else None


def imbalance(record) -> float | None:
    """Return the mean over the intervals of their imbalance."""
    tokens = [[rank.tokens for rank in interval.ranks] for interval in record.history]
    found = [readings.imbalance(of_ranks) for of_ranks in tokens if any(of_ranks)]
    return sum(found) / len(found) if found else None


def gpu_peak_gib(record) -> float:
    """Return the memory of the fullest GPU; 0 if none was monitored."""
    return max((rank.peak_gib for rank in record.ranks), default=0.0)


def log_table(record) -> tuple[list[str], list[list], str]:
    """Return the column names, the rows and the caption of the logged values, in at most 501 rows."""
    entries = [entry for entry in record.log_history if _LOG_COLUMNS.keys() & entry.keys()]
    every = max(1, math.ceil(len(entries) / _LOG_ROWS))
    shown = [entry for place, entry in enumerate(entries) if place % every == 0 or place == len(entries) - 1]
    keys = [key for key in _LOG_COLUMNS if any(key in entry for entry in shown)]
    rows = [[entry["step"], *(entry.get(key, "") for key in keys)] for entry in shown]
    note = f"Every {every}th of {len(entries):,} entries, and the last." if every > 1 else f"{len(entries):,} entries."
    return ["step", *(_LOG_COLUMNS[key] for key in keys)], rows, note
