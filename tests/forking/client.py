"""The side of the tests: start the warm process, and let it launch scripts."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path

# Libraries derive folders from it when they are imported. It cannot be made, so that one they were left with shows.
NO_HOME = "/proc/no/home"
# Variables that a forked process can be given: what reads them does so after the fork, or is told anew (`HF_HOME`).
_FREE_NAMES = ("HF_HOME", "TENSORBOARD_LOGGING_DIR", "PYTEST_CURRENT_TEST")
_FREE_PREFIX = "ACCELERATE_UNSLOTH_"
_STARTING_S = 300
_ENDING_S = 45  # a launcher that is told to end gives its ranks 30 s


class WarmProcess:
    """
    The process that launches are forked from. It ends with this one.

    Args:
        environment (`dict[str, str]`): What the heavy libraries see when they are imported.
        folder (`Path`): Where the launches work.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        self._environment = environment | {"HF_HOME": NO_HOME}
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(Path(__file__).with_name("warm.py")), str(theirs.fileno())],
                env=self._environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests alone
            )
        assert self._receive(_STARTING_S) == "warm"

    def serves(self, environment: dict[str, str]) -> bool:
        """Whether a process forked from this one is the same as a fresh one with this environment."""
        names = {name for name, _ in environment.items() ^ self._environment.items()}
        return all(name in _FREE_NAMES or name.startswith(_FREE_PREFIX) for name in names)

    def launch(self, script: list[str], launcher: list[str], processes: int, environment, timeout_s: float):
        """
        Run `script`, with its arguments, in one process, or in several under `accelerate launch` with `launcher`.

        Returns:
            `tuple[int, str]`: the exit status, and the standard output and error of all processes.

        Raises:
            TimeoutExpired: if the launch has not ended after `timeout_s` seconds; it has then.
        """
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            self._connection.send((script, launcher, processes, environment, output.name))
            pid = self._receive(_STARTING_S)
            try:
                return self._receive(timeout_s), output.read()
            except TimeoutError:
                self._end(pid)
                raise subprocess.TimeoutExpired(script, timeout_s, output.read()) from None

    def _receive(self, timeout_s: float):
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        return self._connection.recv()

    def _end(self, pid: int) -> None:
        """End a launch as its user would, so that the launcher ends its ranks; then without asking."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            os.kill(pid, sign)
            with suppress(TimeoutError):
                self._receive(_ENDING_S)
                return
