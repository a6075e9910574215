"""
SIGTERM and Ctrl-C: finish the step, save one checkpoint, end.

The signal only sets a flag, which the ranks share in the reduction of the step, so that all of them stop after the same
one. A rank that is blocked in a collective cannot read flags. So threads, woken by the signal itself, end the process if
another rank has failed, if the step takes too long, or on a second signal.
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
_REPEAT_S = 1.0  # one Ctrl-C may arrive more than once, through the terminal and the launcher
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _block_signals() -> None:
    """Delay signals while a process forks: one that arrives in between would reach the parent's listener."""
    if StopRequest.listeners:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _unblock_signals() -> None:
    if StopRequest.listeners:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _reset_in_child() -> None:
    """Let a signal end a forked child, such as a data loader's worker, instead of stopping its parent."""
    if StopRequest.listeners:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _unblock_signals()


os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_reset_in_child)


class StopRequest:
    """Holds the signal by which this process was asked to stop, or `None`."""

    listeners = 0

    def __init__(self):
        self.signal: int | None = None
        self._first_at_s = 0.0

    @contextmanager
    def listening(self):
        """Take SIGTERM and SIGINT as requests while the body runs. In another thread than the main one, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read_signals, args=(reader,), daemon=True).start()
        StopRequest.listeners += 1
        try:
            yield
        finally:
            StopRequest.listeners -= 1
            signal.set_wakeup_fd(earlier)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(writer)  # ends the thread

    def _note(self, number: int, frame=None) -> None:
        """Keep the first signal. The handler does it before the main thread goes on, the thread while that is blocked."""
        if self.signal is None:
            self.signal = number

    def _read_signals(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in _SIGNALS:
                continue
            self._note(number[0])
            if not self._first_at_s:
                self._first_at_s = time.monotonic()
                threading.Thread(target=self._enforce_deadline, daemon=True).start()
            elif time.monotonic() - self._first_at_s > _REPEAT_S:
                self._exit()
        os.close(reader)
        self._first_at_s = 0.0

    def _enforce_deadline(self) -> None:
        """End the process if another rank has failed, or shortly before torchelastic kills it."""
        elastic = self.signal == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        deadline_s = time.monotonic() + (GRACE_S if elastic else float("inf"))
        while self._first_at_s:
            if _another_rank_failed():
                self._exit()
            if time.monotonic() > deadline_s:
                print(f"accelerate_unsloth: the step did not end within {GRACE_S:g} s of SIGTERM.", file=sys.stderr)
                sys.stderr.flush()
                self._exit()
            time.sleep(0.2)

    def _exit(self) -> None:
        """End with the status that shells and schedulers give a process ended by this signal."""
        os._exit(128 + self.signal)


def _another_rank_failed() -> bool:
    try:
        return channel().failed_rank() is not None
    except RuntimeError:  # the launcher, and its store with it, is gone
        return True
