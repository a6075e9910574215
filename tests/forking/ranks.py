"""
Ranks for a launcher that are forked before it runs, while this process has no threads and sockets yet.

They wait until the launcher starts them, with the environment and the arguments that it has for them.
"""

import os
import subprocess
import sys
import time
from importlib import import_module
from multiprocessing import Pipe

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

_waiting: list["ForkedRank"] = []


class ForkedRank:
    """A rank as the launcher sees it: what torch's `SubprocessHandler` uses of a `subprocess.Popen`."""

    def __init__(self, pid: int, connection):
        self.pid, self.returncode, self._connection = pid, None, connection

    def start(self, command: tuple[str, ...], environment: dict[str, str]) -> "ForkedRank":
        os.setpgid(self.pid, self.pid)  # the launcher ends it with all that it has started
        self._connection.send((command, environment))
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode


def fork(processes: int) -> tuple[list[str], dict[str, str]] | None:
    """
    Fork the ranks.

    Returns:
        `tuple[list[str], dict[str, str]]`: in a rank, once the launcher starts it, its script with the arguments, and
        its environment. `None` in the launcher.
    """
    for _ in range(processes):
        theirs, ours = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _waiting.clear()
            return _wait(theirs)
        theirs.close()
        _waiting.append(ForkedRank(pid, ours))
    return None


def _wait(connection) -> tuple[list[str], dict[str, str]]:
    try:
        command, environment = connection.recv()
    except EOFError:  # the launcher ended without starting anything
        sys.exit(1)
    interpreter, unbuffered, *script = command
    assert (interpreter, unbuffered) == (sys.executable, "-u"), command
    return script, environment


def supervise(command: list[str]) -> None:
    """Run `accelerate launch` or `torchrun`, given as `-m`, its module and its arguments, in this process."""

    def start(handler, command, environment):
        return _waiting.pop(0).start(command, environment)

    subprocess_handler.SubprocessHandler._popen = start
    _, module, *arguments = command
    launcher = import_module(module)
    sys.argv = [launcher.__file__, *arguments]
    launcher.main()
