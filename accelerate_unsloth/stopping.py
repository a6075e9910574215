"""
SIGTERM and Ctrl-C: finish the step, save one checkpoint, end.

The signal only leaves a note, which the ranks share in the reduction of the step, so that all of them stop after the
same one. A rank that is blocked in a collective cannot look at notes; a thread that the signal itself wakes ends the
process if the others have failed, if it takes too long, or when the user insists.
"""

import os
import signal
import threading
import time
from contextlib import contextmanager

from .channel import channel

# torchelastic gives its processes 30 s between SIGTERM and SIGKILL.
GRACE_S = 20.0
_REPEAT_S = 1.0


class StopRequest:
    """
    Whether this process was asked to stop, and by which signal.

    Example:

    ```python
    >>> from accelerate_unsloth.stopping import StopRequest
    >>> stop = StopRequest()
    >>> with stop.listening():
    ...     stop.signal is None
    True
    ```
    """

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
        try:
            yield
        finally:
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
        """End the process if it does not come to stop by itself."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and self._first_at:
            if self._others_failed():
                break
            time.sleep(0.2)
        if self._first_at:
            os._exit(self.status)

    def _others_failed(self) -> bool:
        try:
            return channel().failed_rank() is not None
        except RuntimeError:  # the launcher, and its store with it, is gone
            return True
