"""Two launchers on the loopback as two machines, each with a rank, a working directory and an environment of its own."""

import socket
import sys
from pathlib import Path

from accelerate_unsloth.launch import configs

from .launching import ROOT, Finished, finish, start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_two_machines(
    script: Path, arguments, environments, processes: int = 4, folders=(ROOT, ROOT), timeout_s: int = 200
) -> list[Finished]:
    """The same command on both, as the configuration file tells it; `processes` are those of both together."""
    port, machines = free_port(), []
    for rank, (environment, folder) in enumerate(zip(environments, folders, strict=True)):
        command = [sys.executable, *configs.launcher("unsloth_ddp_cpu", processes, port)]
        command += ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        command += [str(script), *map(str, arguments)]
        machines.append(start(command, environment, folder))
    return [finish(machine, timeout_s) for machine in machines]
