"""The table that rank 0 prints before training: what was decided, and why."""

from collections.abc import Iterable
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

_VERSIONS = ("unsloth", "trl", "transformers", "accelerate", "peft", "torch")

Row = tuple[str, str, str]  # subject, decision, reason


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    return {name: version(name) for name in _VERSIONS}


def console(width: int = 120) -> Console:
    """Return a console. Without a terminal rich uses 80 columns, which is too narrow for reasons."""
    found = Console()
    return found if found.is_terminal else Console(width=width)


def show(rows: Iterable[Row]) -> None:
    """Print the table."""
    table = Table(title="accelerate_unsloth", title_justify="left", show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console().print(table)
