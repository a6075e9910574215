"""`accelerate-unsloth config`: find the bundled accelerate configuration files, and write others from them."""

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..launch import configs

app = typer.Typer(help="Find the bundled accelerate configuration files, and write others.", no_args_is_help=True)


class Precision(str, Enum):
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _path(name: str) -> Path:
    try:
        return configs.path(name)
    except ValueError as error:
        _fail(str(error))


@app.command("list")
def list_names() -> None:
    """Print the names of the bundled files."""
    typer.echo("\n".join(configs.names()))


@app.command("path")
def print_path(name: str) -> None:
    """Print the path of NAME, for `accelerate launch --config_file "$(accelerate-unsloth config path NAME)"`."""
    typer.echo(_path(name))


@app.command("show")
def show(name: str) -> None:
    """Print the content of NAME."""
    typer.echo(_path(name).read_text(), nl=False)


# `accelerate launch` takes its options with underscores and with dashes.
@app.command("write", context_settings={"token_normalize_func": lambda word: word.replace("_", "-")})
def write(
    file: Annotated[Path, typer.Argument(help="The file to write, which ends with .yaml.")],
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on all machines; one per GPU by default.")
    ] = None,
    num_machines: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    machine_rank: Annotated[int | None, typer.Option(min=0, help="Rank of this machine, from 0.")] = None,
    main_process_ip: Annotated[str | None, typer.Option(help="Address of machine 0.")] = None,
    main_process_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port on machine 0; 29500 by default.")
    ] = None,
    mixed_precision: Annotated[
        Precision, typer.Option(help="For a custom training loop; the Trainer uses its own arguments.")
    ] = Precision.no,
    gpu_ids: Annotated[str | None, typer.Option(help="GPUs of each machine, such as 0,2; all by default.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU, for a dry run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write an accelerate configuration to FILE. In a terminal, ask for what is missing; elsewhere use the defaults."""
    if file.suffix not in (".yaml", ".yml"):
        _fail(f"{file} must end with .yaml or .yml, or accelerate does not read it as YAML.")
    if file.exists() and not force:
        _fail(f"{file} exists already. Give another name, or --force to replace it.")
    asks, several = sys.stdin.isatty() and sys.stdout.isatty(), num_machines > 1
    if num_processes is None:
        num_processes = _default_processes(cpu, gpu_ids, num_machines, asks)
    if several and asks:
        machine_rank = (
            typer.prompt("Rank of this machine, from 0", 0, type=int) if machine_rank is None else machine_rank
        )
        main_process_ip = main_process_ip or typer.prompt("Address of machine 0")
    values = {
        "num_processes": num_processes,
        "num_machines": num_machines,
        "machine_rank": machine_rank or 0,
        "main_process_ip": main_process_ip,
        "main_process_port": 29500 if several and main_process_port is None else main_process_port,
        "mixed_precision": mixed_precision.value,
        "gpu_ids": None if cpu else gpu_ids or "all",
    }
    if problems := _problems(**values, cpu_and_gpus=cpu and gpu_ids is not None):
        _fail("\n".join(problems))
    try:
        _write_with_accelerate(file, "unsloth_ddp_cpu" if cpu else "unsloth_ddp", values)
    except OSError as error:
        _fail(f"{file} could not be written: {error}")
    where, rank = (" on each machine, with its rank as RANK,", " --machine_rank RANK") if several else ("", "")
    typer.echo(f"{file} is written, and accelerate loads it. Launch{where} with")
    # Accelerate does not tell the processes to stay on the CPU (1.15, `prepare_multi_gpu_env`), so no GPU may be visible.
    hidden = "CUDA_VISIBLE_DEVICES= " if cpu else ""
    typer.echo(f"  {hidden}accelerate launch --config_file {shlex.quote(str(file))}{rank} train.py")


def _default_processes(cpu: bool, gpu_ids: str | None, num_machines: int, asks: bool) -> int:
    """Return one process per named or visible GPU of each machine, or two on the CPU."""
    notes: tuple[str, ...] = ()
    if cpu or gpu_ids not in (None, "all"):
        per_machine = 2 if cpu else len(gpu_ids.split(","))
    else:
        from ..devices.manager import DeviceManager

        devices = DeviceManager()
        per_machine, notes = len(devices.get_available_devices()), devices.notes
    if asks:
        return typer.prompt("Processes, on all machines together", per_machine * num_machines or None, type=int)
    if not per_machine:
        _fail(
            f"No GPU is visible, so the number of processes is unknown. {' '.join(notes)} Give --num-processes, or --cpu "
            "for a dry run."
        )
    return per_machine * num_machines


def _problems(
    num_processes: int, num_machines: int, machine_rank: int, main_process_ip: str | None, cpu_and_gpus: bool, **_
) -> list[str]:
    """Return what accelerate would misread or ignore, with the fix."""
    checks = [
        (
            num_processes % num_machines,
            f"num_processes={num_processes} counts the processes of all machines and is not a multiple of num_machines="
            f"{num_machines}. Give a multiple, because each machine starts the same number.",
        ),
        (
            num_machines > 1 and not main_process_ip,
            f"num_machines={num_machines} needs main_process_ip, the address of machine 0 that all others reach.",
        ),
        (
            num_machines == 1 and main_process_ip,
            f"main_process_ip={main_process_ip!r} is for several machines. Give num_machines too, or leave it out.",
        ),
        (
            machine_rank >= num_machines,
            f"machine_rank={machine_rank} must be below num_machines={num_machines}. Machines count from 0.",
        ),
        (cpu_and_gpus, "gpu_ids names GPUs, and cpu does not use them. Leave one of them out."),
    ]
    return [message for wrong, message in checks if wrong]


def _write_with_accelerate(file: Path, bundled: str, values: dict) -> None:
    """Write a bundled configuration with other values through Accelerate's own class, and load the file with it."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(configs.path(bundled)))
    vars(config).update(values)
    config.distributed_type = DistributedType.MULTI_GPU if values["num_processes"] > 1 else DistributedType.NO
    file.parent.mkdir(parents=True, exist_ok=True)
    config.to_yaml_file(str(file))
    load_config_from_file(str(file))
