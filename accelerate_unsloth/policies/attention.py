"""
Which attention kernel rows of uneven length run through.

Without flash-attn or xformers Unsloth runs rows without padding segment by segment through PyTorch's SDPA, which on
Hopper and later prefers cuDNN. cuDNN builds a plan for every length it has not seen: 84 ms forward and 63 ms backward on
an H200. Flash attention builds none, and is 1 to 5% slower once cuDNN has its plans (`benchmarks/RESULTS.md`). Best is one
call for all rows: Unsloth's varlen path from PyTorch 2.12 on, and the same path lent to 2.11 (`engines/kernels.py`). Only
rows of one length are better off with cuDNN, and the longer they are the more (3% at 512 tokens, 13% at 8,192).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from ..engines import kernels

# A plan costs what 5% of about three seconds of training are worth: with few lengths it soon pays for itself.
CUDNN_MAX_LENGTHS = 32

_KERNELS = ("cudnn", "flash", "efficient")


@dataclass(frozen=True)
class Facts:
    """What the choice depends on. `engines.kernels.describe` gives all but the lengths."""

    sdpa_runs_segments: bool  # whether rows go through PyTorch's SDPA: one by one, or padded ones together
    other: str  # what runs them otherwise, or why they never run in one varlen call, for the reason
    prefers_cudnn: bool  # whether PyTorch would use cuDNN on this GPU
    lengths: int  # number of different lengths in the data; 0 if not known
    has_varlen: bool = False  # whether one call of PyTorch's could run all rows, and does not by itself
    runs_varlen: bool = False  # whether Unsloth runs all rows in that call by itself


@dataclass(frozen=True)
class AttentionChoice:
    backend: str  # "varlen" | "cudnn" | "flash" | "efficient" | "unchanged"
    reason: str  # one clause, shown in the start-up table
    keeps_cudnn: bool = False  # whether "varlen" leaves long rows to cuDNN, by Unsloth's own rule


def resolve(requested: str, facts: Facts) -> AttentionChoice:
    """
    Choose the kernel; `requested` is the plugin's option.

    Raises:
        ValueError: if `"varlen"` is asked for where there is none.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import attention
    >>> facts = attention.Facts(sdpa_runs_segments=True, other="", prefers_cudnn=True, lengths=1500)
    >>> attention.resolve("auto", facts).backend
    'flash'
    ```
    """
    if requested == "varlen" and facts.runs_varlen:
        return AttentionChoice("varlen", f"asked for; {facts.other}", keeps_cudnn=True)
    if requested == "varlen" and not facts.has_varlen:
        why = facts.other or "it takes PyTorch 2.11 or later on a GPU"
        raise ValueError(f"attention='varlen' is not available here ({why}). Leave it at 'auto'.")
    if requested != "auto":
        return AttentionChoice(requested, "asked for")
    if not facts.sdpa_runs_segments:
        return AttentionChoice("unchanged", facts.other)
    if facts.prefers_cudnn and 0 < facts.lengths <= CUDNN_MAX_LENGTHS:
        few = f"{facts.lengths} different length(s), for which cuDNN's plans pay"
        if facts.lengths == 1 or not facts.has_varlen:  # rows of one length are one call already
            return AttentionChoice("unchanged", few)
        return AttentionChoice("varlen", f"short rows in one call; {few} where rows are long", keeps_cudnn=True)
    if facts.has_varlen:
        return AttentionChoice(
            "varlen", "all rows of a micro-batch in one call of PyTorch's, instead of one call each"
        )
    if not facts.prefers_cudnn:
        return AttentionChoice("unchanged", "PyTorch does not prefer cuDNN on this device")
    many = f"{facts.lengths} different lengths" if facts.lengths else "lengths that are not known"
    return AttentionChoice("flash", f"cuDNN would build a plan for each of {many}")


@contextmanager
def applied(choice: AttentionChoice) -> Iterator[None]:
    """Let PyTorch's SDPA use the chosen kernel in this process, and what it used before afterwards."""
    import torch

    cuda = torch.backends.cuda
    switches = {
        "cudnn": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        "flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    }
    before = {name: is_on() for name, (is_on, _) in switches.items()}
    # Preferred in the order of PyTorch's own list behind it, which the math kernel ends: shapes it cannot do still run.
    flash = _KERNELS[1:]  # varlen is flash attention too
    allowed = {"cudnn": _KERNELS, "flash": flash, "varlen": flash, "efficient": _KERNELS[2:]}.get(choice.backend)
    allowed = None if choice.keeps_cudnn else allowed
    try:
        if allowed:
            for name, (_, enable) in switches.items():
                enable(name in allowed)
        with kernels.varlen_installed() if choice.backend == "varlen" else nullcontext():
            yield
    finally:
        for name, (_, enable) in switches.items():
            enable(before[name])
