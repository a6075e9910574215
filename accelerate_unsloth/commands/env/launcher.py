"""The launcher's environment, if this process is inside one: known names only, so that no secret is ever shown."""

from collections.abc import Mapping
from dataclasses import fields

from ...plugin import PREFIX, UnslothPlugin
from .finding import NOTE, Finding

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_SETTINGS = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS",
    "UNSLOTH_COMPILE_LOCATION", "UNSLOTH_COMPILE_DISABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME",
)  # fmt: skip


def findings(environment: Mapping[str, str]) -> list[Finding]:
    """
    A line for the launcher and one for the settings that bear on training.

    Args:
        environment (`Mapping[str, str]`): Such as `os.environ`.
    """
    launcher, options = _chosen(environment, _LAUNCHER), [PREFIX + f.name.upper() for f in fields(UnslothPlugin)]
    settings = _chosen(environment, [*_SETTINGS, *options])
    found = [Finding("launcher", launcher or "none: this process was started by hand")]
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        found[0] = Finding("launcher", launcher, NOTE, "RANK without WORLD_SIZE is a leftover: unset it.")
    return [*found, Finding("settings", settings)] if settings else found


def _chosen(environment: Mapping[str, str], names) -> str:
    return ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
