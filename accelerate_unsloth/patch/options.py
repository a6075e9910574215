"""What `enable_multi_gpu` takes, checked."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ..plugin import UnslothPlugin

_BACKENDS = ("nccl", "gloo")
_SWITCHES = ("enable_memory_optimization", "enable_gradient_checkpointing", "find_unused_parameters")


@dataclass(frozen=True)
class Options:
    """The arguments of [`enable_multi_gpu`], under their names there."""

    num_gpus: int | None = None
    batch_size_per_gpu: int | None = None
    ddp_backend: str = "nccl"
    enable_memory_optimization: bool = True
    enable_gradient_checkpointing: bool | None = None
    find_unused_parameters: bool | None = None
    plugin: UnslothPlugin | None = None

    def __post_init__(self):
        for name in ("num_gpus", "batch_size_per_gpu"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} is not a whole number of at least 1. Give one, or leave it out.")
        for name in _SWITCHES:
            value, may_be_none = getattr(self, name), name != "enable_memory_optimization"
            if not isinstance(value, bool) and not (value is None and may_be_none):
                known = "True, False or None" if may_be_none else "True or False"
                raise ValueError(f"{name}={value!r} is not known; use {known}.")
        if self.ddp_backend not in _BACKENDS:
            raise ValueError(f"ddp_backend={self.ddp_backend!r} is not known; choose one of {', '.join(_BACKENDS)}.")
        if self.plugin is not None and not isinstance(self.plugin, UnslothPlugin):
            raise ValueError(
                f"plugin={self.plugin!r} is a {type(self.plugin).__name__}; pass an accelerate_unsloth.UnslothPlugin."
            )

    def as_arguments(self) -> dict[str, Any]:
        """The options as `enable_multi_gpu(**arguments)` takes them."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def resolve_plugin(self) -> UnslothPlugin:
        """The plugin that trainers get; arguments that a plugin has as well win over it."""
        changes = {}
        if self.find_unused_parameters is not None:
            changes["find_unused_parameters"] = self.find_unused_parameters
        if not self.enable_memory_optimization:
            changes["gradient_as_bucket_view"] = False
        plugin = self.plugin or UnslothPlugin()
        if self.enable_gradient_checkpointing and plugin.gradient_checkpointing == "auto":
            changes["gradient_checkpointing"] = "unsloth"  # an argument of ours asks for it, not the script
        return replace(plugin, **changes)


@dataclass(frozen=True)
class BackendChoice:
    name: str  # "nccl" | "gloo" | "none"
    reason: str  # one clause, shown in the status


def resolve_backend(requested: str, world_size: int, on_cpu: bool) -> BackendChoice:
    """
    Choose how the process group of the launch communicates.

    Example:

    ```python
    >>> from accelerate_unsloth.patch.options import resolve_backend
    >>> resolve_backend("nccl", world_size=2, on_cpu=True)
    BackendChoice(name='gloo', reason='this launch uses the CPU, where NCCL cannot run')
    ```
    """
    if world_size == 1:
        return BackendChoice("none", "one process")
    if requested == "nccl" and on_cpu:
        return BackendChoice("gloo", "this launch uses the CPU, where NCCL cannot run")
    return BackendChoice(requested, "asked for, or the default")
