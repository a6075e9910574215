"""What the engine's kernels do with rows and activations, read off Unsloth (2026.10.6) where it is loaded."""

import sys

import torch

_DISPATCH = "unsloth.utils.attention_dispatch"


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
        return False, "Unsloth runs rows of uneven length through PyTorch's varlen attention"
    return True, ""


def prefers_cudnn() -> bool:
    """Whether PyTorch's SDPA takes cuDNN on this device: from Hopper on."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def plans_memory(engine: str) -> bool:
    """Whether the arithmetic of `memory.py` was measured for this engine and device."""
    return engine == "unsloth" and torch.cuda.is_available()


def recomputes(model) -> bool:
    """Whether any layer recomputes its activations in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def set_recomputation(model, mode):
    """
    Switch gradient checkpointing of a loaded model.

    Args:
        model ([`~torch.nn.Module`]): As the engine's `get_peft_model` returned it.
        mode (`bool` or `str`): What Unsloth's `use_gradient_checkpointing` takes.

    Returns:
        `bool` or `str`: what it was before.
    """
    if not hasattr(model, "for_training"):  # the reference engine's
        before = recomputes(model)
        (model.gradient_checkpointing_enable if mode else model.gradient_checkpointing_disable)()
        return before
    before = getattr(model, "_unsloth_gradient_checkpointing", "unsloth")
    model._unsloth_gradient_checkpointing = mode
    model.for_training(use_gradient_checkpointing=mode)
    return before
