"""
How the engine runs attention and recomputes activations, as read from Unsloth (2026.10.6) if it is loaded.

PyTorch is imported inside of functions, because `accelerate-unsloth env` also shows the choices if that import fails.
"""

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ..patches import patched

_DISPATCH = "unsloth.utils.attention_dispatch"
_RUNS_VARLEN = "Unsloth runs rows of uneven length through PyTorch's varlen attention"


def describe(engine: str, padded: bool = False) -> dict:
    """
    Return the fields of `policies.attention.Facts` that do not depend on the data.

    Rows that are `padded` run through PyTorch's SDPA in one call, and never through varlen attention.
    """
    runs_segments, other = sdpa_runs_segments(engine)
    if padded and other in ("", _RUNS_VARLEN):
        runs_segments, other = True, "padded rows run through SDPA in one call"
    return {
        "sdpa_runs_segments": runs_segments,
        "other": other,
        "prefers_cudnn": runs_segments and prefers_cudnn(),
        "has_varlen": runs_segments and not padded and spare_varlen() is not None,
        "runs_varlen": other == _RUNS_VARLEN,
    }


def sdpa_runs_segments(engine: str) -> tuple[bool, str]:
    """Return whether rows without padding run one by one through PyTorch's SDPA, and what runs them otherwise."""
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
    Return PyTorch's varlen attention if Unsloth could use it but does not, else `None`.

    Unsloth's varlen path passes the keyword `enable_gqa`, which PyTorch 2.12 introduced (unsloth 2026.10.6,
    `attention_dispatch._load_torch_varlen_attn`). The kernel of 2.11 supports grouped queries without it. Delete this
    when Unsloth uses the kernel of 2.11, or no longer supports 2.11.
    """
    import torch

    dispatch = sys.modules.get(_DISPATCH)
    disabled = os.environ.get("UNSLOTH_TORCH_VARLEN", "1").lower() in ("0", "false", "no", "off")
    if (
        disabled
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


def varlen_installed() -> AbstractContextManager:
    """Return a context in which Unsloth runs rows of uneven length through [`spare_varlen`], if there is one."""
    varlen = spare_varlen()
    return nullcontext() if varlen is None else patched(sys.modules[_DISPATCH], _TORCH_VARLEN_ATTN=varlen)


def prefers_cudnn() -> bool:
    """Return whether PyTorch's SDPA prefers cuDNN on this device: from Hopper on."""
    import torch

    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def plans_memory(engine: str) -> bool:
    """Return whether the arithmetic of `memory/` was measured for this engine and device."""
    import torch

    return engine == "unsloth" and torch.cuda.is_available()


def recomputes(model) -> bool:
    """Return whether any layer recomputes its activations in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def layers_that_recompute(model) -> list:
    """Return the decoder layers, if each decides for itself whether it recomputes its activations; else none."""
    from ..weights.decoder import find_layers

    layers = [model.get_submodule(layer.path) for layer in find_layers(model)]
    return layers if all(hasattr(layer, "gradient_checkpointing") for layer in layers) else []


def recompute_first(layers: list, number: int) -> None:
    """Let only the first `number` layers recompute their activations, where recomputation is switched on."""
    for layer in layers[number:]:
        layer.gradient_checkpointing = False


def wants_recomputation(model) -> bool:
    """Return whether a loaded model recomputes activations unless something changes that."""
    return bool(getattr(model, "_unsloth_gradient_checkpointing", True))


def set_recomputation(model, mode):
    """
    Switch gradient checkpointing of a loaded model, and return what it was before.

    `mode` is a value of Unsloth's `use_gradient_checkpointing`; `True` is the kind that the model was loaded with.
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
