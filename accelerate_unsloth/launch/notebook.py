"""
Errors for a notebook's kernel that cannot launch a training any more.

`accelerate.notebook_launcher` forks its processes from the kernel. They cannot use a GPU if the kernel has started CUDA, and they
hold what the kernel has loaded, with the settings of a single process.
"""

from typing import NoReturn

from ..patches import patch_log
from .command import is_kernel
from .topology import topology

_FIX = (
    "Restart the kernel, move the imports of accelerate_unsloth, unsloth, trl and transformers into the function that "
    "notebook_launcher runs, and use no GPU in the cells before it."
)


def check_fork(visible_gpus: int) -> None:
    """Raise `RuntimeError` if this process was forked from one that had started CUDA."""
    import torch

    # PyTorch counts a look for GPUs as a start, also where there are none.
    if visible_gpus and torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "A cell of this notebook started CUDA, for which torch.cuda.is_available() is enough, before notebook_launcher "
            f"forked this process from the kernel. {_FIX}"
        )


def forbid_launch(engine: str) -> None:
    """
    Let `accelerate.notebook_launcher` raise an error for several processes, if this is a notebook's kernel.

    The error names `engine`, which is loaded.

    Otherwise accelerate finds bitsandbytes only, and does not tell that the kernel has to be restarted (accelerate 1.15,
    `launchers.py`).
    """
    if topology().world_size > 1 or not is_kernel():
        return
    from accelerate import launchers

    def are_libraries_initialized(*names: str) -> NoReturn:
        raise RuntimeError(
            f"notebook_launcher was called in a kernel in which accelerate_unsloth has loaded its engine ({engine}). The "
            f"processes that it forks cannot train together. {_FIX}"
        )

    patch_log.patch(launchers, "are_libraries_initialized", are_libraries_initialized)
