"""
One message for one error: what an uncaught exception does in a launch of several processes.

Ranks usually fail together, and N tracebacks hide the one sentence that matters. Rank 0 prints its own error at once.
Another rank gives rank 0 a few seconds to report the same error, and prints only what rank 0 does not. Each then ends
with a non-zero status, upon which the launcher ends whoever is left.
"""

import sys
import traceback

from .distributed import PeerFailure, channel, end_process_soon, topology
from .ledger import ledger

_WAIT_FOR_MAIN_S = 8.0


def install() -> None:
    """Report uncaught exceptions once per launch. Without a launcher Python's own report is already right."""
    if topology().world_size > 1 and not ledger.holds(sys, "excepthook"):
        ledger.patch(sys, "excepthook", _make_hook(sys.excepthook))


def _make_hook(show):
    def report_once(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            return show(kind, error, trace)
        own = not issubclass(kind, PeerFailure)
        report = "".join(traceback.format_exception_only(kind, error)).strip() if own else None
        try:
            channel().fail(report)
            own = own and (topology().is_main or channel().wait_for_failure_of_main(_WAIT_FOR_MAIN_S) != report)
        finally:  # a store that is gone already must not swallow the error
            if own:
                if not topology().is_main:
                    print(f"[rank {topology().rank}]", file=sys.stderr)
                show(kind, error, trace)
            sys.stderr.flush()
            end_process_soon()
        return None

    return report_once
