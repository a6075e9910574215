"""`accelerate-unsloth config`: accelerate configuration files, those that come with the library and one's own."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..launch import configs

app = typer.Typer(help="The bundled accelerate configuration files, and a writer of others.", no_args_is_help=True)


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


# `accelerate launch` takes its options with underscores and with dashes.
@app.command("write", context_settings={"token_normalize_func": lambda word: word.replace("_", "-")})
def write(
    file: Annotated[Path, typer.Argument(help="Where it goes: a name that ends with .yaml.")],
    num_processes: Annotated[int | None, typer.Option(help="On all machines; by default one for each GPU.")] = None,
    num_machines: Annotated[int, typer.Option(help="Machines.")] = 1,
    machine_rank: Annotated[int | None, typer.Option(help="This machine's number, from 0.")] = None,
    main_process_ip: Annotated[str | None, typer.Option(help="Address of machine 0.")] = None,
    main_process_port: Annotated[int | None, typer.Option(help="Port on machine 0; 29500 by default.")] = None,
    mixed_precision: Annotated[
        str, typer.Option(help="no, fp16 or bf16, for a loop of one's own; the Trainer goes by its arguments.")
    ] = "no",
    gpu_ids: Annotated[str | None, typer.Option(help="GPUs of each machine, such as 0,2; all by default.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU, for a dry run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write an accelerate configuration to FILE. A terminal is asked for what is missing; elsewhere defaults hold."""
    from ..launch import config_file

    asks = sys.stdin.isatty() and sys.stdout.isatty()
    several = num_machines > 1
    try:
        config_file.check_path(file, force)
        if num_processes is None:
            num_processes = _processes(cpu, gpu_ids, num_machines, asks)
        if several and machine_rank is None:
            machine_rank = typer.prompt("Number of this machine, from 0", 0, type=int) if asks else 0
        if several and main_process_ip is None and asks:
            main_process_ip = typer.prompt("Address of machine 0")
        config_file.LaunchFile(
            num_processes=num_processes,
            num_machines=num_machines,
            machine_rank=machine_rank or 0,
            main_process_ip=main_process_ip,
            main_process_port=main_process_port,
            mixed_precision=mixed_precision,
            gpu_ids=gpu_ids,
            cpu=cpu,
        ).write(file, force)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    where, rank = (" on each machine, with its number as RANK,", " --machine_rank RANK") if several else ("", "")
    typer.echo(f"{file} is written, and accelerate loads it. Launch{where} with")
    hidden = "CUDA_VISIBLE_DEVICES= " if cpu else ""  # see launch_file
    typer.echo(f"  {hidden}accelerate launch --config_file {shlex.quote(str(file))}{rank} train.py")


def _processes(cpu: bool, gpu_ids: str | None, num_machines: int, asks: bool) -> int:
    """One for each GPU that is named or visible, or two on the CPU; as many on each machine."""
    notes: tuple[str, ...] = ()
    if cpu or gpu_ids not in (None, "all"):
        usual = 2 if cpu else len(gpu_ids.split(","))
    else:
        from ..devices.manager import DeviceManager

        devices = DeviceManager()
        usual, notes = len(devices.get_available_devices()), devices.notes
    if asks:
        return typer.prompt("Processes, on all machines together", usual * num_machines or None, type=int)
    if not usual:
        raise ValueError(
            f"No GPU is visible, so the number of processes is not known. {' '.join(notes)} Give --num-processes, or "
            "--cpu for a dry run."
        )
    return usual * num_machines
