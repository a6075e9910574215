"""
Prints one message for one uncaught error of a launch of several processes.

Ranks usually fail together, and N tracebacks hide the one sentence that matters. Rank 0 prints the error if it is that of the
rank that failed first. That rank waits a few seconds for rank 0, and prints the error only if rank 0 does not. Errors that
follow from it, such as a broken connection, are not printed. Each process then ends with a non-zero status, upon which the
launcher ends the others; so those that print nothing wait until the error is printed.
"""

import os
import sys
import threading
import traceback
from contextlib import suppress

from ..launch.channel import PeerFailure, channel
from ..launch.topology import topology
from ..patches import patch_log

_WAIT_FOR_MAIN_S = 6.0
_WAIT_FOR_PRINT_S = _WAIT_FOR_MAIN_S + 2.0  # the one that prints may wait for rank 0 before


def install() -> None:
    """Report uncaught exceptions once per launch; one process keeps Python's own report."""
    if topology().world_size > 1 and not patch_log.holds(sys, "excepthook"):
        patch_log.patch(sys, "excepthook", _make_hook(sys.excepthook))


def _make_hook(show):
    def report_once(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            return show(kind, error, trace)
        shown_here = True
        try:
            shown_here = _should_show(error)
        finally:  # also if the store is already gone
            if shown_here:
                show(kind, error, trace)
            sys.stderr.flush()
            with suppress(Exception):  # the store may be gone
                channel().note_shown() if shown_here else channel().wait_until_shown(_WAIT_FOR_PRINT_S)
            _end_process_soon()
        return None

    return report_once


def _should_show(error: BaseException) -> bool:
    """Report `error` to the other ranks; return whether this rank prints it."""
    report = "".join(traceback.format_exception_only(error)).strip()
    rank = topology().rank
    if isinstance(error, PeerFailure):
        if rank == 0:  # or the rank that failed first would wait for it
            channel().fail(report)
        return False
    first_rank, first_report = channel().fail(report)
    if rank == 0:
        return first_report == report
    return first_rank == rank and channel().wait_for_failure_of_main(_WAIT_FOR_MAIN_S) != report


def _end_process_soon(grace_s: float = 5.0) -> None:
    """Limit the time of exit handlers and communicator threads after an error."""
    timer = threading.Timer(grace_s, os._exit, args=(1,))
    timer.daemon = True
    timer.start()
