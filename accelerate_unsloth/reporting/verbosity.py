"""
Show banners, notices, progress bars and statistics downloads on rank 0 only.

Errors of any rank are always shown; `log_on_each_rank` shows everything.
"""

import logging
import os
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache

from ..launch.topology import topology

_muted = False

# The libraries read these when they are imported.
_QUIET_ENVIRONMENT = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}

# `torch` here means its Python side: warnings of NCCL and Gloo come from C++ and are shown for every rank.
_LOGGERS = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl", "unsloth", "unsloth_zoo")


def quiet_other_ranks(plugin) -> None:
    """Mute this process unless it is rank 0. Call before transformers, datasets or Unsloth are imported."""
    global _muted
    if topology().is_main or plugin.log_on_each_rank or _muted:
        return
    _muted = True
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    mute_libraries()


def mute_libraries() -> None:
    """
    Mute libraries that are imported already and have read their environment, on the muted ranks.

    The Trainer's constructor raises the log level of transformers again, so this is called once more after it.
    """
    if not _muted:
        return
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()


@contextmanager
def muted_prints():
    """Drop what the body prints to standard output, on the muted ranks. Unsloth prints its banners."""
    if not _muted:
        yield
        return
    with redirect_stdout(_nowhere()):
        yield


@lru_cache(maxsize=1)
def _nowhere():
    """Return a file that drops its content. It stays open, because a log handler made meanwhile may keep it."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


class _Drop(logging.Filter):
    """Drops records with one of some texts in their message."""

    def __init__(self, *texts: str):
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in self._texts)


# Logger -> text of a warning that a user can do nothing about. Delete an entry when its versions are no longer supported.
_NOT_FOR_USERS = {
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",  # torch 2.14, imported by torchao 0.16
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # bitsandbytes 0.50: an optional CPU kernel
}


def drop_what_users_cannot_act_on() -> None:
    """Drop such warnings, on all ranks. Call before transformers is imported."""
    for name, text in _NOT_FOR_USERS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(text))


# The first counts the GPUs of one process, the second repeats our table (unsloth 2026.10.9, `models/llama.py`).
# Delete this filter when Unsloth counts the processes of a launch.
_TRAINING_BANNER = ("==((====))==  Unsloth - 2x faster", "Unsloth is running with multi GPUs")


@contextmanager
def without_training_banner():
    """Drop Unsloth's training banner on several processes, which says "Num GPUs used = 1"."""
    llama = sys.modules.get("unsloth.models.llama")
    if llama is None or topology().world_size == 1:
        yield
        return
    drop = _Drop(*_TRAINING_BANNER)
    llama.logger.addFilter(drop)
    try:
        yield
    finally:
        llama.logger.removeFilter(drop)
