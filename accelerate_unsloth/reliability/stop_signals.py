"""
SIGTERM and Ctrl-C: finish the step, save one checkpoint, end.

The signal only leaves a note, which the ranks share in the reduction of the step, so that all of them stop after the
same one. A rank that is blocked in a collective cannot look at notes; a thread that the signal itself wakes ends the
process if the others have failed, if it takes too long, or when the user insists.
"""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

from ..launch.channel import channel

# torchelastic gives its processes 30 s between SIGTERM and SIGKILL.
GRACE_S = 20.0
_REPEAT_S = 1.0


def _forget_in_child() -> None:
    """A forked child, such as a pool's or a data loader's worker, must die of a signal instead of stopping its parent."""
    if StopRequest.listeners:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _hold_signals(False)


def _hold_signals(hold: bool = True) -> None:
    """Keep signals back while a process forks: one that comes in between would reach the parent's listener."""
    if StopRequest.listeners:
        how = signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, (signal.SIGTERM, signal.SIGINT))


os.register_at_fork(
    before=_hold_signals, after_in_parent=lambda: _hold_signals(False), after_in_child=_forget_in_child
)


class StopRequest:
    """
    Whether this process was asked to stop, and by which signal.

    Example:

    ```python
    >>> from accelerate_unsloth.reliability.stop_signals import StopRequest
    >>> stop = StopRequest()
    >>> with stop.listening():
    ...     stop.signal is None
    True
    ```
    """

    listeners = 0

    def __init__(self):
        self.signal: int | None = None
        self._first_at = 0.0

    @property
    def status(self) -> int:
        """The exit status that shells and schedulers give a process ended by this signal."""
        return 128 + self.signal

    @contextmanager
    def listening(self):
        """Take SIGTERM and SIGINT as requests while the body runs. In another thread than the main one, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        watcher.start()
        StopRequest.listeners += 1
        try:
            yield
        finally:
            StopRequest.listeners -= 1
            signal.set_wakeup_fd(earlier)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(writer)  # wakes the watcher, which ends

    def _note(self, number, frame):
        """Nothing: the watcher has seen it. Without a handler the signal would end the process."""

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self.signal is None:
                self.signal, self._first_at = number[0], time.monotonic()
                threading.Thread(target=self._insist, daemon=True).start()
            elif time.monotonic() - self._first_at > _REPEAT_S:
                os._exit(self.status)
        os.close(reader)
        self._first_at = 0.0

    def _insist(self) -> None:
        """End the process if the others have failed, or torchelastic is about to kill it."""
        elastic = self.signal == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        deadline = time.monotonic() + (GRACE_S if elastic else float("inf"))
        while self._first_at:
            if self._others_failed():
                os._exit(self.status)
            if time.monotonic() > deadline:
                print(f"accelerate_unsloth: no end of step within {GRACE_S:g} s of SIGTERM; ending.", file=sys.stderr)
                sys.stderr.flush()
                os._exit(self.status)
            time.sleep(0.2)

    def _others_failed(self) -> bool:
        try:
            return channel().failed_rank() is not None
        except RuntimeError:  # the launcher, and its store with it, is gone
            return True
