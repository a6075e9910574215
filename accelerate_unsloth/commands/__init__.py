"""The command line: `accelerate-unsloth`. One file or package per command."""

import typer

from . import bench, config, env, estimate_memory, test

app = typer.Typer(
    name="accelerate-unsloth",
    help="Exact and fast multi-GPU fine-tuning with Unsloth.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(config.app, name="config")
app.command()(bench.bench)
app.command()(env.env)
app.command("estimate-memory")(estimate_memory.estimate_memory)
app.command()(test.test)


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit
