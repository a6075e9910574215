"""The page: one file, nothing from elsewhere. Every text passes through `_text`."""

import html
import shlex
from collections.abc import Iterable, Sequence

from ..secrets import command_without_secrets, without_secrets
from . import charts, figures
from .record import Record
from .style import CSS

_ROWS = 500  # of the table of all logged values
_COLUMNS = {
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

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}
</main>
</body>
</html>
"""


def render(record: Record) -> str:
    """
    The page of a run.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.html import Record, page
    >>> "<h2>Decisions</h2>" in page.render(Record("tiny", 1, 1, [{"step": 1, "loss": 2.0}], decisions=[("a", "b", "c")]))
    True
    ```
    """
    sections = [
        _section("Where the time went", _times(record)),
        _section("Charts", _charts(record)),
        _section("Each rank", _ranks(record)),
        _section("Decisions", _decisions(record)),
        _section("The run", _table(("", ""), [*record.facts, ("Begun", record.began)] if record.facts else [])),
        _section("Command", _command(record)),
        _section("Versions", _table(("", ""), record.versions.items())),
        _section("All logged values", _log(record)),
    ]
    return _PAGE.format(
        title=_text(f"Training report: {record.model_name}"), css=CSS, header=_header(record), main="\n".join(sections)
    )


def _text(value) -> str:
    """Any value as HTML text or attribute, without markup and secrets of its own."""
    return html.escape(without_secrets(str(value)))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _header(record: Record) -> str:
    cards = [(name, value) for name, value in _cards(record) if value is not None]
    shown = "".join(f"<div><dt>{_text(name)}</dt><dd>{_number(value)}</dd></div>" for name, value in cards)
    warnings = "".join(f"<li>{_text(warning)}</li>" for warning in record.warnings)
    parts = [
        "<h1>Training report</h1>",
        f'<p class="headline">{_text(figures.headline(record))}</p>',
        f'<p class="soft">{_text(figures.ending(record))}</p>',
        f'<ul class="warnings">{warnings}</ul>' if warnings else "",
        f'<dl class="cards">{shown}</dl>',
    ]
    return "\n".join(part for part in parts if part)


def _cards(record: Record) -> list[tuple[str, object]]:
    ranks = figures.ranks(record)
    peak_gib = max((rank.peak_gib for rank in ranks), default=0.0)
    tokens = record.logged("num_tokens")
    return [
        ("Final loss", figures.final_loss(record)),
        ("Steps", record.steps),
        ("Time", figures.duration(record.spent.total_s)),
        ("Tokens", tokens[-1][1] if tokens else None),
        ("Tokens/s", figures.tokens_per_second(record)),
        ("Imbalance", figures.imbalance(record) if record.processes > 1 else None),
        ("GPU peak, GiB", peak_gib or None),
        ("Processes", record.processes),
    ]


def _times(record: Record) -> str:
    shares = figures.shares(record)
    total_s = sum(share.seconds for share in shares) or 1.0
    rows = []
    for share in shares:
        percent = 100 * share.seconds / total_s
        bar = f'<td class="bar" aria-hidden="true"><span style="width: {percent:.1f}%"></span></td>'
        duration = f'<td class="number">{_text(figures.duration(share.seconds))}</td>'
        note = f'<td class="soft">{_text(share.note)}</td>'
        name = f'<th scope="row">{_text(share.name)}</th>'
        rows.append(f'<tr>{name}{duration}<td class="number">{percent:.1f}%</td>{bar}{note}</tr>')
    head = '<tr><th scope="col">Part</th><th scope="col" class="number">Time</th><th scope="col" class="number">Share</th>'
    head += '<td aria-hidden="true"></td><th scope="col">What is in it</th></tr>'
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
    )


def _charts(record: Record) -> str:
    drawn = "\n".join(_chart(chart) for chart in charts.draw(record))
    return f'<div class="charts">\n{drawn}\n</div>' if drawn else ""


def _chart(chart: charts.Chart) -> str:
    label = f'<svg role="img" aria-label="{_text(f"{chart.title}. {chart.description}")}" '
    drawing = chart.svg.replace("<svg ", label, 1)
    return f"<figure>\n<h3>{_text(chart.title)}</h3>\n{drawing}\n<figcaption>{_text(chart.description)}</figcaption>\n</figure>"


def _ranks(record: Record) -> str:
    ranks = figures.ranks(record)
    if not ranks:
        return '<p class="soft">Steps were not monitored (monitor=False), so nothing is known of single ranks.</p>'
    columns = ["Rank", "Device", "Tokens", "Own work a step, s", "Rest of a step, s"]
    rows = [[rank.rank, rank.device, rank.tokens, rank.step_s, rank.waiting_s] for rank in ranks]
    if any(rank.peak_gib for rank in ranks):
        columns += ["GPU in use, GiB", "Reserved, GiB", "Within reach, GiB"]
        rows = [[*row, r.peak_gib, r.reserved_gib, r.reachable_gib] for row, r in zip(rows, ranks, strict=True)]
    columns.append("Host, GiB")
    rows = [[*row, rank.host_gib] for row, rank in zip(rows, ranks, strict=True)]
    caption = "Own work is forward and backward. The rest of a step is waiting for other ranks, data, reduction and "
    return _table(columns, rows, f"{caption}optimizer. Memory is the highest that was read.")


def _decisions(record: Record) -> str:
    return _table(("Subject", "Decision", "Reason"), record.decisions)


def _command(record: Record) -> str:
    if not record.command:
        return ""
    command = _text(shlex.join(command_without_secrets(record.command)))
    together = f"In {record.processes} processes of one launch:" if record.processes > 1 else "In one process:"
    return f'<p class="soft">{together}</p>\n<pre><code>{command}</code></pre>'


def _log(record: Record) -> str:
    """Everything that the charts are drawn from, for readers and for tools."""
    entries = [entry for entry in record.log_history if _COLUMNS.keys() & entry.keys()]
    every = max(1, -(-len(entries) // _ROWS))
    shown = [entry for place, entry in enumerate(entries) if place % every == 0 or place == len(entries) - 1]
    keys = [key for key in _COLUMNS if any(key in entry for entry in shown)]
    rows = [[entry["step"], *(entry.get(key, "") for key in keys)] for entry in shown]
    note = f"Every {every}th of {len(entries):,} entries, and the last." if every > 1 else f"{len(entries):,} entries."
    table = _table(["step", *(_COLUMNS[key] for key in keys)], rows, note)
    return f"<details>\n<summary>Show</summary>\n{table}\n</details>" if rows else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence], caption: str = "") -> str:
    """A table whose first column names the row."""
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    numeric = [any(isinstance(row[place], int | float) for row in rows) for place in range(len(columns))]
    heads = "".join(
        f'<th scope="col"{_class(is_number)}>{_text(column)}</th>'
        for column, is_number in zip(columns, numeric, strict=True)
    )
    head = f"<thead><tr>{heads}</tr></thead>" if any(columns) else ""
    body = ""
    for first, *rest in rows:
        cells = "".join(
            f"<td{_class(is_number)}>{_number(value)}</td>" for value, is_number in zip(rest, numeric[1:], strict=True)
        )
        body += f'<tr><th scope="row"{_class(numeric[0])}>{_number(first)}</th>{cells}</tr>\n'
    said = f"<caption>{_text(caption)}</caption>" if caption else ""
    kind = ' class="figures"' if any(numeric) else "" if head else ' class="facts"'
    return f'<div class="wide">\n<table{kind}>{said}{head}<tbody>\n{body}</tbody></table>\n</div>'


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _number(value) -> str:
    """A number as people read it, with its exact value for tools; other values as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(value)
    return f'<data value="{value!r}">{_text(figures.number(value))}</data>'
