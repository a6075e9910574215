"""What has to be in the environment before Unsloth is imported."""

import os
import platform
from collections.abc import Mapping

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


# Unsloth's own ways to use several GPUs (unsloth 2026.10.9), and the value up to which each is off.
_UNSLOTH_MODES = {"UNSLOTH_FSDP2": 0, "UNSLOTH_TP_SIZE": 1, "UNSLOTH_PP_SIZE": 1}
_OFF = ("", "0", "false", "no", "off")


def check_unsloth_modes(environment: Mapping[str, str] | None = None) -> None:
    """
    Make sure that Unsloth does not split the model or the batch over the GPUs as well.

    Raises:
        ValueError: if an environment variable asks it to.

    Example:

    ```python
    >>> from accelerate_unsloth.engines.environment import check_unsloth_modes
    >>> check_unsloth_modes({"UNSLOTH_TP_SIZE": "1"})
    ```
    """
    environment = os.environ if environment is None else environment
    for name, off in _UNSLOTH_MODES.items():
        value = environment.get(name, "").strip().lower()
        if value not in _OFF and not (value.isdigit() and int(value) <= off):
            raise ValueError(
                f"{name}={environment[name]} lets Unsloth use several GPUs in its own way, and accelerate_unsloth trains with "
                f"plain data parallelism: the two cannot run together. Unset {name}, or import unsloth and trl directly."
            )


def check_loading_arguments(arguments: Mapping[str, object]) -> None:
    """
    Make sure that Unsloth does not keep layers outside of the GPU.

    Raises:
        ValueError: if `offload_layers` asks for it.
    """
    offloaded = arguments.get("offload_layers")
    if offloaded:
        raise ValueError(
            f"offload_layers={offloaded!r} moves layers in and out of the GPU in Unsloth's own way, with a copy in host memory "
            "per process, which accelerate_unsloth does not support. Leave it out, and load in 4 bits or shorten the samples "
            "if the model does not fit."
        )


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
