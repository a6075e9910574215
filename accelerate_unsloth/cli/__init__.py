"""The command line: `accelerate-unsloth`. One file a command."""

import typer

from .bench import bench
from .config import app as config_app
from .env import env
from .estimate_memory import estimate_memory
from .test import test

app = typer.Typer(
    name="accelerate-unsloth",
    help="Exact and fast multi-GPU fine-tuning with Unsloth.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(config_app, name="config")
app.command()(bench)
app.command()(env)
app.command("estimate-memory")(estimate_memory)
app.command()(test)


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit
