"""Start Python alone or under `accelerate launch`, in a clean environment, and end all that was started."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..launch import configs

_PACKAGE_PARENT = Path(__file__).parents[2]
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    status: int
    output: str  # standard output and error of all processes
    seconds: float


def launcher(processes: int, on_gpu: bool) -> list[str]:
    """Return `accelerate launch` for one or several processes, one GPU each or all on the CPU, as options of Python."""
    several = "unsloth_ddp" if on_gpu else "unsloth_ddp_cpu"
    words = configs.launcher(several if processes > 1 else "unsloth_single_gpu", processes)
    return words if processes > 1 or on_gpu else [*words, "--cpu"]


def clean_environment(environment: Mapping[str, str], **variables: str) -> dict[str, str]:
    """Return `environment` without what a launcher left in it: for this package, offline, with `variables` set."""
    paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_LAUNCHER and not name.startswith("TORCHELASTIC_")
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(_PACKAGE_PARENT), *paths])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        **variables,
    }


def start(
    command: list[str], environment: Mapping[str, str], folder: Path, output=subprocess.PIPE
) -> subprocess.Popen:
    """Start a command with its output and errors together, in a session of its own, so that Ctrl-C is not for it."""
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    process.started_at = time.monotonic()
    return process


def finish(process: subprocess.Popen, timeout_s: float) -> Finished:
    """
    Wait for the end of a process; end it with all that it started if that takes longer, or if waiting is interrupted.

    Raises:
        TimeoutExpired: with the output so far.
    """
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        end_all(process)
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            error.output = output
        raise
    return Finished(process.returncode, output or "", time.monotonic() - process.started_at)


def end_all(process: subprocess.Popen) -> None:
    """End a launch with all ranks, each of which is in a session of its own."""
    if process.poll() is None:
        for other in [*psutil.Process(process.pid).children(recursive=True), process]:
            other.kill()
    process.wait()


def run_python(words: list[str], environment: Mapping[str, str], folder: Path, timeout_s: float) -> Finished:
    """Run Python with `words` in `folder`."""
    return finish(start([sys.executable, *words], environment, folder), timeout_s)
