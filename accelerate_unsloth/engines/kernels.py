"""What the engine's kernels do with rows and activations, read off Unsloth (2026.10.6) where it is loaded."""

# PyTorch is imported where it is asked: what would be chosen is also shown where it cannot be imported.

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..patches import Ledger

_DISPATCH = "unsloth.utils.attention_dispatch"
_RUNS_VARLEN = "Unsloth runs rows of uneven length through PyTorch's varlen attention"


def describe(engine: str) -> dict:
    """
    What the choice of an attention kernel depends on, beside the data: arguments of `policies.attention.resolve`.

    Args:
        engine (`str`): `"unsloth"` or `"reference"`.
    """
    runs_segments, other = sdpa_runs_segments(engine)
    return {
        "sdpa_runs_segments": runs_segments,
        "other": other,
        "prefers_cudnn": runs_segments and prefers_cudnn(),
        "has_varlen": runs_segments and spare_varlen() is not None,
        "runs_varlen": other == _RUNS_VARLEN,
    }


def sdpa_runs_segments(engine: str) -> tuple[bool, str]:
    """
    Whether rows without padding run one by one through PyTorch's SDPA, and what runs them otherwise.

    Args:
        engine (`str`): `"unsloth"` or `"reference"`.
    """
    dispatch = sys.modules.get(_DISPATCH)
    if engine != "unsloth" or dispatch is None:
        return False, "the reference engine leaves it to transformers"
    if getattr(dispatch, "HAS_FLASH_ATTENTION", False):
        return False, "flash-attn runs rows of uneven length in one call"
    if getattr(dispatch, "HAS_XFORMERS", False):
        return False, "xformers runs rows of uneven length in one call"
    if getattr(dispatch, "_TORCH_VARLEN_ATTN", None) is not None:
        return False, _RUNS_VARLEN
    return True, ""


def spare_varlen() -> Callable | None:
    """
    PyTorch's varlen attention where Unsloth could use it and does not; `None` elsewhere.

    Unsloth's varlen path wants the keyword `enable_gqa`, which came with PyTorch 2.12 (unsloth 2026.10.6,
    `attention_dispatch._load_torch_varlen_attn`). The kernel of 2.11 does grouped queries without being told. To be deleted
    when Unsloth takes 2.11's, or no longer supports it.
    """
    import torch

    dispatch = sys.modules.get(_DISPATCH)
    refused = os.environ.get("UNSLOTH_TORCH_VARLEN", "1").lower() in ("0", "false", "no", "off")
    if (
        refused
        or not hasattr(dispatch, "_TORCH_VARLEN_ATTN")
        or not torch.backends.cuda.is_flash_attention_available()
    ):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    keywords = inspect.signature(varlen_attn).parameters
    if "window_size" not in keywords or "enable_gqa" in keywords:
        return None

    def varlen_of_2_11(*rows, enable_gqa: bool = False, **options):
        return varlen_attn(*rows, **options)

    return varlen_of_2_11


@contextmanager
def varlen_installed() -> Iterator[None]:
    """Let Unsloth run rows of uneven length through [`spare_varlen`], where there is one."""
    patches, varlen = Ledger(), spare_varlen()
    if varlen is not None:
        patches.patch(sys.modules[_DISPATCH], "_TORCH_VARLEN_ATTN", varlen)
    try:
        yield
    finally:
        patches.undo()


def prefers_cudnn() -> bool:
    """Whether PyTorch's SDPA takes cuDNN on this device: from Hopper on."""
    import torch

    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def plans_memory(engine: str) -> bool:
    """Whether the arithmetic of `memory.py` was measured for this engine and device."""
    import torch

    return engine == "unsloth" and torch.cuda.is_available()


def recomputes(model) -> bool:
    """Whether any layer recomputes its activations in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def wants_recomputation(model) -> bool:
    """Return whether a loaded model recomputes activations unless something changes that."""
    return bool(getattr(model, "_unsloth_gradient_checkpointing", True))


def set_recomputation(model, mode):
    """
    Switch gradient checkpointing of a loaded model.

    Args:
        model ([`~torch.nn.Module`]): As the engine's `get_peft_model` returned it.
        mode (`bool` or `str`):
            What Unsloth's `use_gradient_checkpointing` takes; `True` is the kind that the model was loaded with.

    Returns:
        `bool` or `str`: what it was before.
    """
    if not hasattr(model, "for_training"):  # the reference engine's
        before = recomputes(model)
        (model.gradient_checkpointing_enable if mode else model.gradient_checkpointing_disable)()
        return before
    before = getattr(model, "_unsloth_gradient_checkpointing", "unsloth")
    mode = (before or "unsloth") if mode is True else mode
    model._unsloth_gradient_checkpointing = mode
    model.for_training(use_gradient_checkpointing=mode)
    return before
