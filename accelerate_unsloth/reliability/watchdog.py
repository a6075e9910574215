"""
A run that stands still says where, and ends.

A thread in every process looks whether the process still makes progress. When nothing has happened for too long, it
writes all Python stacks of its process to the output folder, and rank 0 prints where each rank is.
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
_PART_OF_GROUP_TIMEOUT = 0.8  # so that stacks are written before the process group gives up
_ANSWER_S = 10.0
_HEAD_START_S = 2.0


def resolve_timeout(requested_s: float | None, group_timeout_s: float, world_size: int) -> float:
    """
    Return the longest time without progress, in seconds; 0 for no watchdog.

    Args:
        requested_s (`float`, *optional*): The plugin's `watchdog_timeout_s`.
        group_timeout_s (`float`): After which the process group gives up; the training arguments' `ddp_timeout`.
        world_size (`int`): Number of processes.

    Raises:
        ValueError: if the process group would give up first.

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
            f"watchdog_timeout_s={requested_s}, but the process group gives up after ddp_timeout={group_timeout_s}, and its "
            f"error does not say where the ranks are. Set ddp_timeout={int(-(-requested_s // _PART_OF_GROUP_TIMEOUT))} in the "
            f"training arguments, or watchdog_timeout_s to at most {int(most_s)}."
        )
    return requested_s


class Watchdog:
    """
    Ends the process when `beat` has not been called for `timeout_s` seconds.

    Args:
        timeout_s (`float`): Longest time without progress.
        folder (`Path`): Where the stacks are written, as `stuck-rank<N>.txt`.
    """

    def __init__(self, timeout_s: float, folder: Path):
        self.timeout_s = timeout_s
        self.folder = folder
        self.step = 0
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self.beat(self.step)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Progress was made: `step` is the current optimizer step."""
        self.step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self._last > self.timeout_s:
                self._bark()

    def _bark(self) -> None:
        rank = topology().rank
        where = _main_thread_position()
        with suppress(OSError):  # a full disk may be why the run stands still
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"stuck-rank{rank}.txt").open("w") as file:
                file.write(f"rank {rank}, step {self.step}, no progress for {self.timeout_s:g} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        self._tell(rank, where)
        if rank != 0:
            time.sleep(_HEAD_START_S)  # the first process to end makes the launcher end the others
        os._exit(1)

    def _tell(self, rank: int, where: str) -> None:
        """Every rank says where it is; rank 0 prints it for all."""
        own = f"step {self.step}, {where}"
        try:
            positions = channel().exchange("stuck", own, _ANSWER_S)
        except (PeerFailure, RuntimeError):
            positions = {rank: own}
        if rank == 0:
            lines = [f"  rank {r}: {position or 'does not answer'}" for r, position in sorted(positions.items())]
            print(
                f"No step has ended for {self.timeout_s:g} s (watchdog_timeout_s). The ranks are at:\n"
                + "\n".join(lines)
                + f"\nAll stacks are in {self.folder}/stuck-rank*.txt. Training ends; resume it with "
                "resume_from_checkpoint='auto'.",
                file=sys.stderr,
                flush=True,
            )


def _main_thread_position() -> str:
    frame = sys._current_frames()[threading.main_thread().ident]
    # The innermost line that is not a library's plumbing tells most.
    innermost = traceback.extract_stack(frame)[-1]
    return f"{innermost.name} ({innermost.filename}:{innermost.lineno})"
