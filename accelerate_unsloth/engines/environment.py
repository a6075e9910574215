"""What Unsloth sets in the environment at its import, where it has to be set earlier."""

import os
import platform

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def allocator_is_configured() -> bool:
    """Whether the user's environment sets up PyTorch's allocator, which is then left alone."""
    return any(name in os.environ for name in _ALLOCATOR)


def set_allocator_defaults() -> None:
    """
    Let the CUDA allocator use expandable segments, as Unsloth does (unsloth_zoo 2026.10.7, `__init__.py`).

    The allocator reads its settings when CUDA starts, and a rank starts CUDA on its own GPU before Unsloth is imported.
    """
    standby = os.environ.get("UNSLOTH_VLLM_STANDBY", "0") != "0"
    windows_subsystem = "microsoft" in platform.release().lower()  # its driver fails on expandable segments
    if not standby and not windows_subsystem and not allocator_is_configured():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
