"""
The drawings, as SVG inside of the page.

Text and axes take the page's colour, so that one drawing serves light and dark; lines differ in colour, dash and name.
pyplot is left alone, and with it the backend that a script or notebook has chosen.
"""

import io
import re
from dataclasses import dataclass

from . import figures
from .record import Record

# Each at least 3:1 against the page, light and dark.
_COLOURS = ("#2f7ed8", "#d8611e", "#1d9a6c", "#a45ee0", "#c2437c", "#8a7a00", "#2590a0", "#777f8c")
_DASHES = ("solid", "dashed", "dashdot", "dotted")
# A colour that nothing else has, for what shall follow the page.
_PAGE_COLOUR = "#010203"
_POINTS = 600
_LINES = len(_COLOURS)

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _PAGE_COLOUR,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _PAGE_COLOUR),
}


@dataclass(frozen=True)
class Chart:
    """A drawing: `description` says in words what it shows."""

    title: str
    description: str
    svg: str


def draw(record: Record) -> list[Chart]:
    """
    All charts that there are figures for.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.html import Record, charts
    >>> record = Record("tiny", 2, 2, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    >>> [chart.title for chart in charts.draw(record)]
    ['Loss']
    ```
    """
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        drawn = [_loss(record), _speed(record), _imbalance(record), _step_time(record), _gpu_memory(record)]
        drawn.append(_host_memory(record))
    return [chart for chart in drawn if chart is not None]


def _loss(record: Record) -> Chart | None:
    lines = {"training": record.logged("loss"), "evaluation": record.logged("eval_loss")}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    said = [f"{name} from {_said(points[0][1])} to {_said(points[-1][1])}" for name, points in lines.items()]
    return _over_steps("Loss", lines, "loss", f"Loss by step: {'; '.join(said)}.", from_zero=False)


def _speed(record: Record) -> Chart | None:
    points = record.logged("tokens_per_second")
    if not points:
        return None
    description = f"Tokens per second of all ranks by step: {_range(points)}."
    return _over_steps("Speed", {"all ranks": points}, "tokens/s", description)


def _imbalance(record: Record) -> Chart | None:
    points = record.logged("token_imbalance")
    if not points or record.processes == 1:
        return None
    description = (
        f"Tokens of the rank with the most over the mean of the ranks, by step, where 1 is level: {_range(points)}."
    )
    return _over_steps("Imbalance", {"most / mean": points}, "tokens, most / mean", description, from_zero=False)


def _step_time(record: Record) -> Chart | None:
    lines = _by_rank(record, lambda reading: reading.step_s)
    if not lines:
        return None
    by_time = sorted(figures.ranks(record), key=lambda rank: rank.step_s)
    said = [f"{_said(rank.step_s)} s on rank {rank.rank}" for rank in dict.fromkeys((by_time[-1], by_time[0]))]
    description = f"Each rank's own forward and backward a step: on average {', '.join(said)}."
    return _over_steps("Own work a step", lines, "seconds", description)


def _host_memory(record: Record) -> Chart | None:
    lines = _by_rank(record, lambda reading: reading.host_gib)
    if not lines:
        return None
    highest = max(rank.host_gib for rank in figures.ranks(record))
    description = f"GiB of host memory of each rank's process by step, at most {_said(highest)}."
    return _over_steps("Host memory", lines, "GiB a process", description)


def _gpu_memory(record: Record) -> Chart | None:
    ranks = [rank for rank in figures.ranks(record) if rank.peak_gib]
    if not ranks:
        return None
    names = [rank.rank for rank in ranks]
    figure, axes = _new_figure()
    kinds = (
        ("within reach", [rank.reachable_gib for rank in ranks], _COLOURS[-1], 0.35),
        ("reserved, highest", [rank.reserved_gib for rank in ranks], _COLOURS[0], 0.5),
        ("in use, highest", [rank.peak_gib for rank in ranks], _COLOURS[0], 1.0),
    )
    for (kind, values, colour, alpha), width in zip(kinds, (0.8, 0.6, 0.6), strict=True):
        axes.bar(names, values, width=width, color=colour, alpha=alpha, label=kind)
    _label(axes, "rank", "GiB")
    axes.margins(x=max(0.05, 0.5 - 0.1 * len(ranks)))
    axes.grid(visible=False, axis="x")
    _legend_above(axes, 3)
    fullest = max(ranks, key=lambda rank: rank.peak_gib)
    description = f"GiB of GPU memory of each rank: rank {fullest.rank} used the most, {_said(fullest.peak_gib)} of "
    return Chart(
        "GPU memory", f"{description}{_said(fullest.reachable_gib)} within its reach.", _svg(figure, "gpu-memory")
    )


def _by_rank(record: Record, value) -> dict[str, list[tuple[int, float]]]:
    """A line for each rank; of many ranks, the lowest, the mean and the highest."""
    intervals = record.history.intervals
    if not intervals:
        return {}
    rows = [(interval.step, [value(reading) for reading in interval.ranks]) for interval in intervals]
    if len(rows[0][1]) > _LINES:
        kinds = {"lowest rank": min, "mean": lambda values: sum(values) / len(values), "highest rank": max}
        return {name: [(step, kind(values)) for step, values in rows] for name, kind in kinds.items()}
    return {f"rank {rank}": [(step, values[rank]) for step, values in rows] for rank in range(len(rows[0][1]))}


def _over_steps(title: str, lines: dict, unit: str, description: str, from_zero: bool = True) -> Chart:
    figure, axes = _new_figure()
    for number, (name, points) in enumerate(lines.items()):
        drawn, each = figures.thinned(points, _POINTS)
        if each > 1:
            description += f" Each point is the mean of {each} logs."
        steps, values = zip(*drawn, strict=True)
        axes.plot(
            steps,
            values,
            color=_COLOURS[number],
            linestyle=_DASHES[number % len(_DASHES)],
            linewidth=1.6,
            marker="o" if len(drawn) <= 40 else None,
            markersize=3.5,
            label=name,
        )
    _label(axes, "step", unit)
    if from_zero:
        axes.set_ylim(0, 1.1 * max(value for points in lines.values() for _, value in points) or 1)
    if len(lines) > 1:
        _legend_above(axes, min(4, len(lines)))
    return Chart(title, description, _svg(figure, title.lower().replace(" ", "-")))


def _label(axes, x: str, y: str) -> None:
    """Names of the axes; whole numbers along x, where one rank or step alone has a tick too."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


def _new_figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    return figure, figure.subplots()


def _legend_above(axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=2.4)


def _svg(figure, name: str) -> str:
    """SVG for the inside of an HTML page, whose identifiers no other drawing of the page has."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same figures give the same file
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'width="[^"]*" height="[^"]*" ', "", svg, count=1)  # as wide as the page lets it be
    return svg.replace(_PAGE_COLOUR, "currentColor")


def _said(value: float) -> str:
    return figures.number(float(value))


def _range(points: list[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    return f"from {_said(min(values))} to {_said(max(values))}"
