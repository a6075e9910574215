"""The side of the tests: start the warm process, and let it launch scripts."""

import atexit
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.reduction import send_handle
from pathlib import Path

# Libraries derive folders from it when they are imported. It cannot be made, so that one they were left with shows.
NO_HOME = "/proc/no/home"
# Variables that a forked process can be given: what reads them does so after the fork, or is told anew (`HF_HOME`).
_FREE_NAMES = ("HF_HOME", "HF_TOKEN", "WANDB_API_KEY", "TENSORBOARD_LOGGING_DIR", "PYTEST_CURRENT_TEST")
_FREE_PREFIX = "ACCELERATE_UNSLOTH_"
_STARTING_S = 300
_ENDING_S = 45  # a launcher that is told to end gives its ranks 30 s


class WarmProcess:
    """
    The process that launches are forked from. It ends with the tests.

    Args:
        environment (`dict[str, str]`): What the heavy libraries see when they are imported.
        folder (`Path`): Where the launches work.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment = environment | {"HF_HOME": NO_HOME}
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(Path(__file__).with_name("warm.py")), str(theirs.fileno())],
                env=self.environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests alone
            )
        assert self._receive(_STARTING_S) == "warm"
        atexit.register(self.close)

    def close(self) -> None:
        """Let the process end, and wait for it, so that what the launches took is counted as these tests' own."""
        self._connection.close()
        self._process.wait()

    def serves(self, environment: dict[str, str]) -> bool:
        """Whether a process forked from this one is the same as a fresh one with this environment."""
        names = {name for name, _ in environment.items() ^ self.environment.items()}
        return all(name in _FREE_NAMES or name.startswith(_FREE_PREFIX) for name in names)

    def launch(self, script: list[str], launcher: list[str], processes: int, environment, timeout_s: float):
        """
        Run `script`, with its arguments, in one process, or in several under `launcher`: `-m`, a module and its options.

        Returns:
            `tuple[int, str]`: the exit status, and the standard output and error of all processes.

        Raises:
            TimeoutExpired: with the output so far, if the launch had not ended after `timeout_s` seconds.
        """
        # A pipe, as with subprocess, because a limit for files that a test sets must not hold for the output.
        output, theirs = os.pipe()
        try:
            self._connection.send((script, launcher, processes, environment))
            send_handle(self._connection, theirs, self._process.pid)
        finally:
            os.close(theirs)
        pid, chunks = self._receive(_STARTING_S), []
        with open(output, "rb", buffering=0) as stream:
            try:
                _read(stream, chunks, time.monotonic() + timeout_s)
                status = self._receive(timeout_s)
            except TimeoutError:
                self._end(pid)
                raise subprocess.TimeoutExpired(script, timeout_s, _text(chunks)) from None
        return status, _text(chunks)

    def _receive(self, timeout_s: float):
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        return self._connection.recv()

    def _end(self, pid: int) -> None:
        """End a launch as its user would, so that the launcher ends its ranks; then without asking."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # it has ended, and something that it started still holds the output
                os.kill(pid, sign)
            with suppress(TimeoutError):
                self._receive(_ENDING_S)
                return


def _read(stream, chunks: list[bytes], deadline: float) -> None:
    """Collect what a pipe gives until nobody can write to it any more."""
    while True:
        ready, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        chunk = stream.read(1 << 16)
        if not chunk:
            return
        chunks.append(chunk)


def _text(chunks: list[bytes]) -> str:
    """As subprocess decodes it in text mode: line ends are one character."""
    return b"".join(chunks).decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
