"""`accelerate-unsloth config`: the accelerate configuration files that come with the library."""

import typer

from .. import configs

app = typer.Typer(help="The bundled accelerate configuration files.", no_args_is_help=True)


def _path(name: str):
    try:
        return configs.path(name)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


@app.command("list")
def list_names() -> None:
    """Print the names."""
    typer.echo("\n".join(configs.names()))


@app.command("path")
def print_path(name: str) -> None:
    """Print where NAME lies, for `accelerate launch --config_file "$(accelerate-unsloth config path NAME)"`."""
    typer.echo(_path(name))


@app.command("show")
def show(name: str) -> None:
    """Print the file of NAME."""
    typer.echo(_path(name).read_text(), nl=False)
