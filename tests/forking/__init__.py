"""
Launches whose processes are forked from one that has imported the heavy libraries, once a test session.

Importing torch, transformers, trl and datasets takes each process of a real launch about ten seconds of CPU time, and
its work on a tiny model one. What runs here is `accelerate launch` or `torchrun` itself, with its own options, environment,
supervision and reports; only where it would start `python script.py` for a rank, a forked process becomes that
interpreter.
"""

import os
import signal
import subprocess
import time
from multiprocessing import Pipe, forkserver, get_context
from pathlib import Path
from threading import Thread
from unittest import mock

# Libraries derive folders from it when they are imported. It cannot be made, so that one they were left with shows.
NO_HOME = "/proc/no/home"
# Variables that a forked process can be given: what reads them does so after the fork, or is told anew.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_A_TEST = ("HF_HOME", "HF_TOKEN", "WANDB_API_KEY", "TENSORBOARD_LOGGING_DIR", "TMPDIR", "PYTEST_CURRENT_TEST")
_OURS = "ACCELERATE_UNSLOTH_"
_ENDING_S = 45  # a launcher that is told to end gives its ranks 30 s


class ForkServer:
    """
    Starts launches, several at a time if wanted. It ends with the tests.

    Args:
        environment (`dict[str, str]`): What the heavy libraries see when they are imported.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment | {"HF_HOME": NO_HOME}
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["tests.forking.preload"])
        with mock.patch.dict(os.environ, self.environment, clear=True):
            forkserver.ensure_running()

    def serves(self, environment: dict[str, str]) -> bool:
        """Tell whether a forked process is the same as a fresh one with this environment."""
        names = {name for name, _ in environment.items() ^ self.environment.items()}
        return all(name in _OF_A_RANK + _OF_A_TEST or name.startswith(_OURS) for name in names)

    def start(self, script: list[str], launcher: list[str], processes: int, environment, folder: Path) -> "Launch":
        """
        Start `script`, with its arguments, in `folder`: by itself, or in several processes under `launcher`, which is
        `-m`, a module and its options.
        """
        from .launched import run  # light here, and the server has what it needs

        # A pipe, as with subprocess, because a limit for files that a test sets must not hold for the output.
        output, theirs = Pipe(duplex=False)
        arguments = (script, launcher, processes, environment, str(folder), theirs)
        process = self._context.Process(target=run, args=arguments)
        process.start()
        theirs.close()
        return Launch(process, output, script)


class Launch:
    """One that runs; its output is read by a thread."""

    def __init__(self, process, output, script: list[str]):
        self.process, self.script, self._output, self._chunks = process, script, output, []
        self.started_at = time.monotonic()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def finish(self, timeout_s: float) -> tuple[int, str]:
        """
        Wait for its end: the exit status, and the standard output and error of all processes.

        Raises:
            TimeoutExpired: with the output so far, if somebody can still write after `timeout_s` seconds.
        """
        self._reader.join(timeout_s)
        if self._reader.is_alive():
            self._end()
            raise subprocess.TimeoutExpired(self.script, timeout_s, self._text())
        self.process.join()
        return self.process.exitcode, self._text()

    def _end(self) -> None:
        """End it as its user would, so that the launcher ends its ranks; then with SIGKILL."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self.process.is_alive():
                os.kill(self.process.pid, sign)
                self.process.join(_ENDING_S)
        self._reader.join(_ENDING_S)

    def _read(self) -> None:
        with open(self._output.fileno(), "rb", buffering=0, closefd=False) as stream:
            while chunk := stream.read(1 << 16):
                self._chunks.append(chunk)

    def _text(self) -> str:
        """As subprocess decodes it in text mode: line ends are one character."""
        return b"".join(self._chunks).decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
