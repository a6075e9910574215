"""
Environment variables that are checked or set before Unsloth is imported.

What the user has set is never changed.
"""

import os
import platform
from collections.abc import Mapping

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Unsloth's own multi-GPU modes (unsloth 2026.10.9), and the value up to which each is off.
_UNSLOTH_MODES = {"UNSLOTH_FSDP2": 0, "UNSLOTH_TP_SIZE": 1, "UNSLOTH_PP_SIZE": 1}
_OFF = ("", "0", "false", "no", "off")


def check_unsloth_modes(environment: Mapping[str, str] | None = None) -> None:
    """Raise `ValueError` if a variable makes Unsloth split the model or the batch over the GPUs as well."""
    environment = os.environ if environment is None else environment
    for name, off in _UNSLOTH_MODES.items():
        value = environment.get(name, "").strip().lower()
        if value not in _OFF and not (value.isdigit() and int(value) <= off):
            raise ValueError(
                f"{name}={environment[name]} turns on a multi-GPU mode of Unsloth, which cannot run together with the "
                f"data parallelism of accelerate_unsloth. Unset {name}, or import unsloth and trl directly."
            )


def set_defaults(node: int) -> None:
    """
    Set defaults of PyTorch's allocator and, on every node but the first, of Unsloth's compile folder.

    The allocator reads its settings when CUDA starts, before Unsloth is imported and sets them itself (unsloth_zoo
    2026.10.7, `__init__.py`).

    Unsloth writes generated code into the working directory (unsloth_zoo 2026.10.7, `compiler.py`). On a shared disk
    all nodes would write the same files, under file locks that some network file systems lack, and nodes with
    different GPUs would replace each other's. Delete this when Unsloth separates nodes.
    """
    standby = os.environ.get("UNSLOTH_VLLM_STANDBY", "0") != "0"
    windows_subsystem = "microsoft" in platform.release().lower()  # its driver fails on expandable segments
    if not standby and not windows_subsystem and not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if node > 0:
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"unsloth_compiled_cache_node{node}")
