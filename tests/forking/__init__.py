"""
Launches whose processes are forked from one warm process, which has imported the heavy libraries once a test session.

Importing torch, transformers, trl and datasets takes each process of a real launch about ten seconds of CPU time, and
its work on a tiny model one. What runs here is `accelerate launch` or `torchrun` itself, with its own options, environment,
supervision and reports; only where it would start `python script.py` for a rank, a forked process becomes that
interpreter.
"""

from .client import WarmProcess

__all__ = ["WarmProcess"]
