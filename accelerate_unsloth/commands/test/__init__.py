"""`accelerate-unsloth test`: the installation check."""

import typer


def test(
    num_processes: int = typer.Option(None, help="Processes to compare with one; by default all GPUs, or 2 on a CPU."),
    timeout_s: float = typer.Option(300.0, help="Longest time of each launch, in seconds."),
) -> None:
    """Train a tiny model on one process and on several, and compare. Status 1 if something is wrong."""
    from .run import passed, run

    try:
        running = run(num_processes, timeout_s)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    checks = []
    for check in running:
        typer.echo(check)
        checks.append(check)
    works = passed(checks)
    typer.echo(
        "This installation works." if works else "This installation does not work: see `accelerate-unsloth env`."
    )
    raise typer.Exit(0 if works else 1)
