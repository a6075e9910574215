"""
The drawings, as SVG inside of the page.

Text and axes take the page's colour, so that one drawing serves light and dark; lines differ in colour, dash and name.
pyplot is not used, so the backend that a script or notebook has chosen stays.
"""

import io
from collections.abc import Iterator
from typing import NamedTuple

from .figures import number

# Each at least 3:1 against the page, light and dark.
_COLOURS = ("#2f7ed8", "#d8611e", "#1d9a6c", "#a45ee0", "#c2437c", "#8a7a00", "#2590a0", "#777f8c")
_DASHES = ("solid", "dashed", "dashdot", "dotted")
_PAGE_COLOUR = "#010203"  # replaced by the colour of the page's text
_POINTS = 600
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


class Chart(NamedTuple):
    """A drawing; `description` says what it shows, and `svg` is its element without the leading `<svg `."""

    title: str
    description: str
    svg: str


def draw(record) -> list[Chart]:
    """Return all charts that the record has values for."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        return [*_of_the_log(record), *_of_the_ranks(record)]


def _of_the_log(record) -> Iterator[Chart]:
    lines = {"training": record.logged("loss"), "evaluation": record.logged("eval_loss")}
    lines = {name: points for name, points in lines.items() if points}
    if lines:
        ends = [f"{name} from {_text(of[0][1])} to {_text(of[-1][1])}" for name, of in lines.items()]
        yield _lines("Loss", lines, "loss", f"Loss by step: {'; '.join(ends)}.", from_zero=False)
    if points := record.logged("tokens_per_second"):
        description = f"Tokens per second of all ranks by step: {_range(points)}."
        yield _lines("Speed", {"all ranks": points}, "tokens/s", description)
    if record.processes > 1 and (points := record.logged("token_imbalance")):
        description = f"Tokens of the rank with the most over the mean of the ranks, by step, where 1 is balanced: {_range(points)}."
        yield _lines("Imbalance", {"most / mean": points}, "tokens, most / mean", description, from_zero=False)


def _of_the_ranks(record) -> Iterator[Chart]:
    ranks = record.ranks
    if not ranks:
        return
    by_time = sorted(range(len(ranks)), key=lambda rank: ranks[rank].step_s)
    ends = [f"{_text(ranks[rank].step_s)} s on rank {rank}" for rank in dict.fromkeys((by_time[-1], by_time[0]))]
    description = f"Seconds of each rank's own forward and backward per step: on average {', '.join(ends)}."
    yield _lines("Own work per step", _by_rank(record, "step_s"), "seconds", description)
    if any(rank.peak_gib for rank in ranks):
        yield _gpu_memory(ranks)
    highest = max(rank.host_gib for rank in ranks)
    description = f"GiB of host memory of each rank's process by step, at most {_text(highest)}."
    yield _lines("Host memory", _by_rank(record, "host_gib"), "GiB per process", description)


def _gpu_memory(ranks) -> Chart:
    names = [rank for rank, reading in enumerate(ranks) if reading.peak_gib]
    figure, axes = _new_figure()
    for kind, attribute, colour, alpha, width in (
        ("reachable", "reachable_gib", _COLOURS[-1], 0.35, 0.8),
        ("reserved, highest", "reserved_gib", _COLOURS[0], 0.5, 0.6),
        ("in use, highest", "peak_gib", _COLOURS[0], 1.0, 0.6),
    ):
        values = [getattr(ranks[rank], attribute) for rank in names]
        axes.bar(names, values, width=width, color=colour, alpha=alpha, label=kind)
    axes.margins(x=max(0.05, 0.5 - 0.1 * len(names)))
    axes.grid(visible=False, axis="x")
    fullest = max(names, key=lambda rank: ranks[rank].peak_gib)
    description = (
        f"GiB of GPU memory of each rank: rank {fullest} used the most, {_text(ranks[fullest].peak_gib)} of "
        f"{_text(ranks[fullest].reachable_gib)} that it can reach."
    )
    return Chart("GPU memory", description, _svg(figure, axes, "gpu-memory", "rank", "GiB", legend_columns=3))


def _by_rank(record, attribute: str) -> dict[str, list[tuple[int, float]]]:
    """Return a line for each rank; of many ranks, the lowest, the mean and the highest."""
    rows = [(interval.step, [getattr(rank, attribute) for rank in interval.ranks]) for interval in record.history]
    if len(record.ranks) > len(_COLOURS):
        kinds = {"lowest rank": min, "mean": lambda values: sum(values) / len(values), "highest rank": max}
        return {name: [(step, kind(values)) for step, values in rows] for name, kind in kinds.items()}
    return {f"rank {rank}": [(step, values[rank]) for step, values in rows] for rank in range(len(record.ranks))}


def _lines(title: str, lines: dict, unit: str, description: str, from_zero: bool = True) -> Chart:
    """Return a chart of lines over steps."""
    figure, axes = _new_figure()
    most_points = max(len(points) for points in lines.values())
    each = -(-most_points // _POINTS)
    if each > 1:
        description += f" Each point is the mean of {each} logs."
    for place, (name, points) in enumerate(lines.items()):
        drawn = _thinned(points, each)
        axes.plot(
            *zip(*drawn, strict=True),
            color=_COLOURS[place],
            linestyle=_DASHES[place % len(_DASHES)],
            linewidth=1.6,
            marker="o" if len(drawn) <= 40 else None,
            markersize=3.5,
            label=name,
        )
    if from_zero:
        axes.set_ylim(0, 1.1 * max(value for points in lines.values() for _, value in points) or 1)
    columns = min(4, len(lines)) if len(lines) > 1 else 0
    return Chart(title, description, _svg(figure, axes, title.lower().replace(" ", "-"), "step", unit, columns))


def _thinned(points: list[tuple[int, float]], each: int) -> list[tuple[int, float]]:
    """Return the mean of every `each` neighbours, at the last of their steps."""
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _new_figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    return figure, figure.subplots()


def _svg(figure, axes, name: str, x: str, y: str, legend_columns: int) -> str:
    """Label the axes and return SVG for the inside of an HTML page, with identifiers that no other drawing has."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    if legend_columns:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(ncols=legend_columns, handlelength=2.4, **place)
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same figures give the same file
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue().partition("<svg ")[2].replace(_PAGE_COLOUR, "currentColor")
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{name}-")
    return svg


def _text(value: float) -> str:
    return number(float(value))


def _range(points: list[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    return f"from {_text(min(values))} to {_text(max(values))}"
