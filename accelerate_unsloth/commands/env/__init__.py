"""`accelerate-unsloth env`: report what this machine and installation would do with a training run."""

import json
from dataclasses import asdict

import typer

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def env(as_json: bool = typer.Option(False, "--json", help="Print JSON and nothing else.")) -> None:
    """Check versions, imports, GPUs, automatic choices and disk space. Exit status 1 if training cannot work."""
    from rich.console import Console

    with Console(stderr=True).status("Importing the libraries that train"):
        findings = examine()
    works = can_train(findings)
    if as_json:
        typer.echo(json.dumps({"can_train": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings, works)
    raise typer.Exit(0 if works else 1)


def examine() -> list:
    """Return the findings about this machine and installation. With Unsloth that takes about half a minute."""
    from ...devices.manager import DeviceManager
    from . import checks, choices, imports

    manager = DeviceManager()
    devices = manager.get_available_devices()
    records = imports.import_libraries()
    visible_gpus = records.get("torch", {}).get("gpus", len(devices))
    engine, chosen = choices.check_choices(visible_gpus, devices, records.get("unsloth", {}).get("kernels"))
    return [
        *checks.check_versions(engine),
        *imports.check_imports(records, len(devices)),
        *checks.check_gpus(devices, manager.notes, manager.driver),
        *chosen,
        *checks.list_variables(),
        *checks.check_space(),
    ]


def can_train(findings) -> bool:
    """Return whether none of the findings is a problem."""
    return all(finding.verdict != "problem" for finding in findings)


def _print_table(findings, works: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from ...reporting.startup_table import console

    table = Table("", "", "verdict", title="accelerate_unsloth", title_justify="left", pad_edge=False)
    for finding in findings:
        value = "\n".join(filter(None, [finding.value, finding.fix and f"-> {finding.fix}"]))
        # Text, because rich would read brackets in values as markup.
        table.add_row(Text(finding.subject), Text(value), Text(finding.verdict, style=_COLOURS[finding.verdict]))
    output = console()
    output.print(table)
    output.print("Training can work here." if works else "Training cannot work here: fix the problems above.")
