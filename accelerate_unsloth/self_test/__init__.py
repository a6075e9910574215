"""
The installation check: does this machine train one model on several processes, and the same one as on one process?

It takes the way of a user: a tiny model made on the spot, `accelerate launch`, the library's trainer, and plain PEFT
to load what was saved. Each of these runs in processes of its own; this one imports nothing heavy.
"""

from .check import FAILED, OK, SKIPPED, Check
from .run import passed, run

__all__ = ["FAILED", "OK", "SKIPPED", "Check", "passed", "run"]
