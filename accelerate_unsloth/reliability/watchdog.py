"""
Ends a run that hangs, and reports where.

A thread in every process checks whether the process still makes progress. After too long a time without any, it writes all
Python stacks of its process to the output folder, and rank 0 prints the position of each rank.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from ..launch.channel import PeerFailure, channel
from ..launch.topology import topology

_DEFAULT_S = 3600
_PART_OF_GROUP_TIMEOUT = 0.8  # so that stacks are written before the process group times out
_ANSWER_S = 10.0  # time for the other ranks to send their positions
_HEAD_START_S = 2.0  # of rank 0, which prints them


def resolve_timeout(requested_s: float | None, group_timeout_s: float, world_size: int) -> float:
    """
    Return the longest time without progress, in seconds; 0 for no watchdog.

    `requested_s` is the plugin's `watchdog_timeout_s`, and `group_timeout_s` the training arguments' `ddp_timeout`. Raise
    `ValueError` if the process group would time out first.

    Example:

    ```python
    >>> from accelerate_unsloth.reliability.watchdog import resolve_timeout
    >>> resolve_timeout(None, 1800, world_size=1), resolve_timeout(None, 1800, world_size=2)
    (3600, 1440.0)
    ```
    """
    most_s = _PART_OF_GROUP_TIMEOUT * group_timeout_s
    if requested_s is None:
        return _DEFAULT_S if world_size == 1 else min(_DEFAULT_S, most_s)
    if world_size > 1 and requested_s > most_s:
        raise ValueError(
            f"watchdog_timeout_s={requested_s}, but the process group times out after ddp_timeout={group_timeout_s}, and its "
            f"error does not say where the ranks are. Set ddp_timeout={int(-(-requested_s // _PART_OF_GROUP_TIMEOUT))} in the "
            f"training arguments, or watchdog_timeout_s to at most {int(most_s)}."
        )
    return requested_s


class Watchdog:
    """
    Ends the process when `beat` has not been called for `timeout_s` seconds.

    The stacks go into `stuck-rank<N>.txt` in `folder`.
    """

    def __init__(self, timeout_s: float, folder: Path):
        self.timeout_s, self.folder, self.step = timeout_s, folder, 0
        self._last_s = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        self.beat(self.step)
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Note progress; `step` is the current optimizer step."""
        self.step, self._last_s = step, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self._last_s > self.timeout_s:
                self._report_and_exit()

    def _report_and_exit(self) -> None:
        rank = topology().rank
        position = f"step {self.step}, {_main_thread_position()}"
        with suppress(OSError):  # a full disk may be the reason of the hang
            self._write_stacks(rank)
        try:
            positions = channel().gather_within("stuck", position, _ANSWER_S)
        except (PeerFailure, RuntimeError):
            positions = {rank: position}
        if rank == 0:
            lines = [f"  rank {r}: {where or 'does not answer'}" for r, where in sorted(positions.items())]
            print(
                f"No step has ended for {self.timeout_s:g} s (watchdog_timeout_s). Positions of the ranks:",
                *lines,
                f"All stacks are in {self.folder}/stuck-rank*.txt. Training ends; resume it with "
                "resume_from_checkpoint='auto'.",
                sep="\n",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(_HEAD_START_S)  # the first process to end makes the launcher end the others
        os._exit(1)

    def _write_stacks(self, rank: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"stuck-rank{rank}.txt").open("w") as file:
            file.write(f"rank {rank}, step {self.step}, no progress for {self.timeout_s:g} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _main_thread_position() -> str:
    innermost = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])[-1]
    return f"{innermost.name} ({innermost.filename}:{innermost.lineno})"
