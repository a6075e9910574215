"""
One message for one error: what an uncaught exception does in a launch of several processes.

Ranks usually fail together, and N tracebacks hide the one sentence that matters. Rank 0 prints what it shares with the
rank that failed first; that rank gives rank 0 a few seconds to do so, and prints only what rank 0 does not. An error
that follows from another rank's (a broken connection, say) is not printed. Each process then ends with a non-zero
status, upon which the launcher ends whoever is left.
"""

import os
import sys
import threading
import traceback

from ..launch.channel import PeerFailure, channel
from ..launch.topology import topology
from ..patches import ledger

_WAIT_FOR_MAIN_S = 6.0


def install() -> None:
    """Report uncaught exceptions once per launch. Without a launcher Python's own report is already right."""
    if topology().world_size > 1 and not ledger.holds(sys, "excepthook"):
        ledger.patch(sys, "excepthook", _make_hook(sys.excepthook))


def _make_hook(show):
    def report_once(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            return show(kind, error, trace)
        shown_here = True
        try:
            shown_here = not issubclass(kind, PeerFailure) and _is_ours_to_show(error)
        finally:  # a store that is gone already must not swallow the error
            if shown_here:
                show(kind, error, trace)
            sys.stderr.flush()
            _end_process_soon()
        return None

    return report_once


def _is_ours_to_show(error: BaseException) -> bool:
    """Tell the other ranks of `error`, and find out whether this rank is the one to print it."""
    report = "".join(traceback.format_exception_only(error)).strip()
    rank = topology().rank
    first_rank, first_report = channel().fail(report)
    if rank == 0:
        return first_report == report
    return first_rank == rank and channel().wait_for_failure_of_main(_WAIT_FOR_MAIN_S) != report


def _end_process_soon(grace_s: float = 5.0) -> None:
    """Bound the time that exit handlers and communicator threads may take once this process has failed."""
    timer = threading.Timer(grace_s, os._exit, args=(1,))
    timer.daemon = True
    timer.start()
