"""Two launchers on the loopback as two machines, each with a rank, a working directory and an environment of its own."""

from pathlib import Path

from accelerate_unsloth.launch import configs

from .launching import ROOT, Finished, finish, start_script
from .workers.by_fork import free_port


def launch_two_machines(
    script: Path,
    arguments,
    environments,
    processes: int = 4,
    folders=(ROOT, ROOT),
    timeout_s: int = 200,
    real_launcher: bool = False,
) -> list[Finished]:
    """The same command on both, as the configuration file tells it; `processes` are those of both together."""
    port, machines = free_port(), []
    words = [str(script), *map(str, arguments)]
    for rank, (environment, folder) in enumerate(zip(environments, folders, strict=True)):
        options = [*configs.launcher("unsloth_ddp_cpu", processes, port), "--num_machines", "2"]
        options += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        machines.append(start_script(words, options, processes // 2, environment, folder, real_launcher))
    return [finish(machine, timeout_s) for machine in machines]
