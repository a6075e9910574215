"""Start Python modules of this package, alone or under `accelerate launch`, and end all they started."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ...launch import configs

_PACKAGE_PARENT = Path(__file__).parents[3]
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAST_LINES = 15


class ProcessFailed(RuntimeError):
    """A started process did not end in order; the message holds the end of its output."""


def launch_command(num_processes: int, on_gpu: bool) -> list[str]:
    """
    `accelerate launch` of a module in one or several processes, as options of Python.

    Args:
        num_processes (`int`): How many.
        on_gpu (`bool`): One GPU each, or all on the CPU.
    """
    several = "unsloth_ddp" if on_gpu else "unsloth_ddp_cpu"
    words = configs.launcher(several if num_processes > 1 else "unsloth_single_gpu", num_processes)
    if num_processes == 1 and not on_gpu:
        words += ["--cpu"]
    return [*words, "-m"]


def clean_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """
    `environment` for a run of its own inside `folder`: offline, not part of a launch, and leaving no trace elsewhere.
    """
    paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_LAUNCHER and not name.startswith("TORCHELASTIC_")
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE_PARENT), *paths]),
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth_compiled_cache"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_python(words: list[str], folder: Path, timeout_s: float) -> None:
    """
    Run Python with `words` inside `folder`.

    Raises:
        ProcessFailed: if it ends with another status than 0, or not within `timeout_s` seconds.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env=clean_environment(folder, os.environ),
        start_new_session=True,  # so that it can be ended together with all that it starts
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise ProcessFailed(f"no end after {timeout_s:.0f} s\n{_end(output)}") from None
    if process.returncode:
        raise ProcessFailed(f"ended with status {process.returncode}\n{_end(output)}")


def _end(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-_LAST_LINES:])
