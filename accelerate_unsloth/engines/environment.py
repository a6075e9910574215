"""What has to be in the environment before Unsloth is imported."""

import os
import platform

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def allocator_is_configured() -> bool:
    """Whether the user's environment sets up PyTorch's allocator, which is then left alone."""
    return any(name in os.environ for name in _ALLOCATOR)


def prepare(node: int) -> None:
    """
    Set what the user has not.

    Args:
        node (`int`): Index of this machine in the launch.
    """
    set_allocator_defaults()
    if node > 0:
        set_compile_location(node)


def set_compile_location(node: int) -> None:
    """
    Give a machine a folder of its own for the code that Unsloth generates.

    Unsloth writes it into the working directory (unsloth_zoo 2026.10.7, `compiler.py`): with a shared disk all machines
    would write the same files, under file locks that some network file systems do not have, and machines with different
    GPUs would replace each other's. Delete this when Unsloth tells machines apart.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"unsloth_compiled_cache_node{node}")


def set_allocator_defaults() -> None:
    """
    Let the CUDA allocator use expandable segments, as Unsloth does (unsloth_zoo 2026.10.7, `__init__.py`).

    The allocator reads its settings when CUDA starts, and a rank starts CUDA on its own GPU before Unsloth is imported.
    """
    standby = os.environ.get("UNSLOTH_VLLM_STANDBY", "0") != "0"
    windows_subsystem = "microsoft" in platform.release().lower()  # its driver fails on expandable segments
    if not standby and not windows_subsystem and not allocator_is_configured():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
