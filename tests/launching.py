"""Start worker scripts as a user would: under `accelerate launch`, with real processes."""

import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from accelerate_unsloth.launch import configs
from accelerate_unsloth.testing import launching
from accelerate_unsloth.testing.launching import Finished

from .forking import ForkServer, Launch

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "workers"


def launch(
    script: Path,
    arguments=(),
    processes: int = 2,
    environment=None,
    timeout_s: int = 120,
    config: str = "unsloth_ddp_cpu",
    launcher=(),
    inside=(),
    real_launcher: bool = False,
    torchrun: bool = False,
) -> Finished:
    """
    Run `script` in `processes` processes, with `launcher` as further options of `accelerate launch`, or of `torchrun`, and
    `inside` as the command that all of it runs in; fail the test if they have not ended after `timeout_s` seconds.

    The processes are forked from one that has imported the heavy libraries, see `tests/forking`. Everything is started
    afresh with `real_launcher`, with a command around it, and with variables that libraries read when they are imported.
    A script that imports the real Unsloth needs that too, because Unsloth comes before the libraries that it patches.
    """
    options = []
    if processes > 1:
        with_torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        options = [*(with_torchrun if torchrun else configs.launcher(config, processes)), *launcher]
    words = [str(script), *map(str, arguments)]
    if inside:
        return finish(start([*inside, sys.executable, *options, *words], environment), timeout_s)
    return finish(start_script(words, options, processes, environment, real_launcher=real_launcher), timeout_s)


def start_script(
    words: list[str], options: list[str], processes: int, environment=None, folder: Path = ROOT, real_launcher=False
):
    """Start a script with its arguments under the launcher in `options`; `processes` are those of this machine."""
    cleaned = clean_environment(environment)
    if real_launcher or not fork_server().serves(cleaned):
        return start([sys.executable, *options, *words], environment, folder)
    return fork_server().start(words, options, processes, cleaned, folder)


@lru_cache(maxsize=1)
def fork_server() -> ForkServer:
    """Return the one of this test session."""
    return ForkServer(clean_environment())


def start(command: list[str], environment=None, folder: Path = ROOT, output=subprocess.PIPE) -> subprocess.Popen:
    return launching.start(command, clean_environment(environment), folder, output)


def finish(started: subprocess.Popen | Launch, timeout_s: int) -> Finished:
    try:
        if isinstance(started, subprocess.Popen):
            return launching.finish(started, timeout_s)
        return Finished(*started.finish(timeout_s), time.monotonic() - started.started_at)
    except subprocess.TimeoutExpired as expired:
        raise AssertionError(f"no end after {timeout_s} s: {expired.cmd}\n{expired.output[-4000:]}") from None


def clean_environment(extra=None) -> dict[str, str]:
    """This environment without what a launcher or an earlier test left in it, and without GPUs or a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "UNSLOTH_"))}
    return launching.clean_environment(kept, CUDA_VISIBLE_DEVICES="") | (extra or {})


def result(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"result{rank}.json").read_text())
