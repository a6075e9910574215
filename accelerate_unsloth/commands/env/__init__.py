"""`accelerate-unsloth env`: what this machine and installation would do with a training run."""

import json
from dataclasses import asdict

import typer

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def env(as_json: bool = typer.Option(False, "--json", help="Print JSON and nothing else.")) -> None:
    """Check versions, libraries, GPUs, choices, caches and space. Status 1 if training cannot work."""
    from rich.console import Console

    from . import examine

    with Console(stderr=True).status("Importing what a training would"):
        findings = examine.examine()
    works = examine.can_train(findings)
    if as_json:
        typer.echo(json.dumps({"can_train": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings, works)
    raise typer.Exit(0 if works else 1)


def _print_table(findings, works: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "verdict", title="accelerate_unsloth", title_justify="left", pad_edge=False)
    for finding in findings:
        value = "\n".join(filter(None, [finding.value, finding.remedy and f"-> {finding.remedy}"]))
        # Text, because values hold brackets, which rich would take for markup.
        table.add_row(Text(finding.subject), Text(value), Text(finding.verdict, style=_COLOURS[finding.verdict]))
    console = Console()
    # Without a terminal rich takes 80 columns, which is too narrow for reasons.
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print("Training can work here." if works else "Training cannot work here: mend the problems above.")
