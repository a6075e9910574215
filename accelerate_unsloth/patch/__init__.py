"""
Unmodified scripts on several GPUs: one call in front replaces Unsloth's loaders and TRL's trainers in memory.

    import accelerate_unsloth
    accelerate_unsloth.enable_multi_gpu()
    from unsloth import FastLanguageModel
    from trl import SFTTrainer

The replacements are the classes of the explicit imports. Each goes through the patch log, so `disable_multi_gpu()` can
remove it again.
"""

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..launch import command
from ..launch.topology import topology, uses_cpu
from ..patches import Patch, patch_log
from ..plugin import PREFIX, UnslothPlugin, is_count
from ..reliability import failures

# Accepted so that existing calls keep working, with their defaults. Gradients are not reduced by
# DistributedDataParallel, the launch decides the backend, and memory is planned from what each GPU has.
WITHOUT_EFFECT = {"ddp_backend": "nccl", "enable_memory_optimization": True, "find_unused_parameters": None}

# Options that are read from the environment when the engine is loaded, before any trainer sees a plugin.
_READ_AT_LOADING = ("engine", "log_on_each_rank")


@dataclass(frozen=True)
class _Active:
    options: dict[str, Any]
    plugin: UnslothPlugin
    patches: list[Patch]


_active: _Active | None = None


class Enabled:
    """What [`enable_multi_gpu`] returns. As a context manager it disables what that call enabled."""

    def __init__(self, by_this_call: bool):
        self._by_this_call = by_this_call

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *error) -> None:
        if self._by_this_call:
            disable_multi_gpu()


def enable_multi_gpu(
    num_gpus: int | None = None,
    batch_size_per_gpu: int | None = None,
    ddp_backend: str = "nccl",
    enable_memory_optimization: bool = True,
    enable_gradient_checkpointing: bool | None = None,
    find_unused_parameters: bool | None = None,
    plugin: UnslothPlugin | None = None,
) -> Enabled:
    """
    Run the rest of an Unsloth script on all processes of this launch. Call it before importing unsloth and trl.

    Args:
        num_gpus (`int`, *optional*):
            Number of processes that the script needs, on all nodes. Nothing is started: a process without a launcher
            ends with exit status 2 and the command to run. By default any launch is accepted.
        batch_size_per_gpu (`int`, *optional*):
            Overrides the script's `per_device_train_batch_size`.
        ddp_backend (`str`, *optional*, defaults to `"nccl"`):
            Has no effect: NCCL is used on GPUs and Gloo on CPUs.
        enable_memory_optimization (`bool`, *optional*, defaults to `True`):
            Has no effect: memory is always planned.
        enable_gradient_checkpointing (`bool`, *optional*):
            Overrides the script's choice, in the loading calls and in the trainer's arguments.
        find_unused_parameters (`bool`, *optional*):
            Has no effect: parameters without a gradient need no search.
        plugin ([`UnslothPlugin`], *optional*):
            All other options; by default those of the environment. A trainer's own `plugin=` takes precedence.

    Returns:
        [`Enabled`]: for `with`, which restores everything at its end, also after an error.

    Raises:
        ValueError: for an invalid value, a launch of another size, or fewer visible GPUs than requested.
        RuntimeError: if it is already enabled with other options, or the script has already imported unsloth or trl.
        SystemExit: with status 2, if `num_gpus` needs a launcher and none started this process.

    Example:

    ```python
    >>> import accelerate_unsloth
    >>> with accelerate_unsloth.enable_multi_gpu():
    ...     from trl import SFTTrainer
    >>> SFTTrainer is accelerate_unsloth.SFTTrainer
    True
    ```
    """
    failures.install()  # an error in here is an error of every rank
    options = {
        "num_gpus": num_gpus,
        "batch_size_per_gpu": batch_size_per_gpu,
        "enable_gradient_checkpointing": enable_gradient_checkpointing,
        "plugin": plugin,
    }
    if problems := find_problems(options):
        raise ValueError(" ".join(problems))
    if _active is not None:
        _reject_other_options(options)
        return Enabled(by_this_call=False)
    _warn_without_effect(
        ddp_backend=ddp_backend,
        enable_memory_optimization=enable_memory_optimization,
        find_unused_parameters=find_unused_parameters,
    )
    command.require(num_gpus, _visible_gpus())
    _enable(options)
    return Enabled(by_this_call=True)


def disable_multi_gpu() -> None:
    """
    Restore every attribute that [`enable_multi_gpu`] replaced. Without it, do nothing.

    The engine stays loaded, with what it has patched itself (see `get_multi_gpu_status()`). Names that a script has
    already imported keep their values.

    Example:

    ```python
    >>> import accelerate_unsloth
    >>> accelerate_unsloth.disable_multi_gpu()
    >>> accelerate_unsloth.is_multi_gpu_enabled()
    False
    ```
    """
    global _active
    if _active is not None:
        patch_log.undo(_active.patches)
        _active = None


def is_multi_gpu_enabled() -> bool:
    """Return whether [`enable_multi_gpu`] is in effect."""
    return _active is not None


def get_active_config() -> dict[str, Any] | None:
    """
    Return the options in effect, as `enable_multi_gpu(**config)` takes them.

    Returns:
        `dict[str, Any]`, or `None` if it is not enabled.
    """
    return None if _active is None else dict(_active.options)


def get_multi_gpu_status() -> dict[str, Any]:
    """
    Describe this process and what is changed in memory.

    Returns:
        `dict[str, Any]`: `enabled`, `world_size`, `rank`, `device` of this rank, `visible_devices`, and `patches`: each
        patched attribute with the name of its original. While enabled also `engine` with its reason, and `plugin`.

    Example:

    ```python
    >>> import accelerate_unsloth
    >>> accelerate_unsloth.get_multi_gpu_status()["enabled"]
    False
    ```
    """
    here, devices = topology(), [f"cuda:{index}" for index in range(_visible_gpus())] or ["cpu"]
    status = {
        "enabled": _active is not None,
        "world_size": here.world_size,
        "rank": here.rank,
        "device": devices[here.local_rank if here.local_rank < len(devices) else 0],
        "visible_devices": devices,
        "patches": [_describe(patch) for patch in patch_log.patches],
    }
    if _active is not None:
        from ..engines.select import choice

        status |= {"engine": asdict(choice), "plugin": asdict(_active.plugin)}
    return status


def find_problems(options: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with options of [`enable_multi_gpu`], each with its fix."""
    problems = []
    for name in ("num_gpus", "batch_size_per_gpu"):
        value = options.get(name)
        if value is not None and not is_count(value):
            problems.append(f"{name}={value!r} is not a whole number of at least 1. Give one, or leave it out.")
    checkpointing, plugin = options.get("enable_gradient_checkpointing"), options.get("plugin")
    if checkpointing is not None and not isinstance(checkpointing, bool):
        problems.append(f"enable_gradient_checkpointing={checkpointing!r} is unknown; use True, False or None.")
    if plugin is not None and not isinstance(plugin, UnslothPlugin):
        problems.append(f"plugin={plugin!r} is a {type(plugin).__name__}; pass an accelerate_unsloth.UnslothPlugin.")
    elif plugin is not None and (checkpointing, plugin.gradient_checkpointing) in ((True, "none"), (False, "unsloth")):
        problems.append(
            f"enable_gradient_checkpointing={checkpointing} contradicts the plugin's gradient_checkpointing="
            f"{plugin.gradient_checkpointing!r}. Leave one of them out."
        )
    return problems


def _warn_without_effect(**options) -> None:
    ignored = [f"{name}={value!r}" for name, value in options.items() if value != WITHOUT_EFFECT[name]]
    if ignored and topology().is_main:
        warnings.warn(
            f"enable_multi_gpu() accepts {', '.join(ignored)}, which has no effect here. Leave it out.", stacklevel=3
        )


def _reject_other_options(options: dict[str, Any]) -> None:
    active = _active.options
    differences = [
        f"{name}={options[name]!r} instead of {active[name]!r}" for name in options if options[name] != active[name]
    ]
    if differences:
        raise RuntimeError(
            f"enable_multi_gpu() is already in effect, and this call asks for {', '.join(differences)}. Call "
            "disable_multi_gpu() first, or give all options in one call."
        )


def _enable(options: dict[str, Any]) -> None:
    """Load the engine and install all patches; after an error, none."""
    global _active
    plugin, patches = options["plugin"] or UnslothPlugin(), []
    if options["enable_gradient_checkpointing"] and plugin.gradient_checkpointing == "auto":
        plugin = replace(plugin, gradient_checkpointing="unsloth")
    try:
        read_at_loading = _READ_AT_LOADING if options["plugin"] else ()
        patches += [
            patch_log.patch(os.environ, PREFIX + name.upper(), str(getattr(plugin, name))) for name in read_at_loading
        ]
        from . import points  # loads the engine

        points.install(options, plugin, on_cpu=_visible_gpus() == 0, patches=patches)
    except BaseException:
        patch_log.undo(patches)
        raise
    _active = _Active(options, plugin, patches)


def _visible_gpus() -> int:
    """Return how many GPUs this process may use: none in a launch on the CPU."""
    import torch

    return 0 if uses_cpu() else torch.cuda.device_count()


def _describe(patch: Patch) -> dict[str, str]:
    return {
        "patched": f"{_name(patch.owner)}.{patch.name}",
        "original": _name(patch.original) if patch.had_original else "absent",
        "now": _name(patch.replacement),
    }


def _name(thing: Any) -> str:
    thing = getattr(thing, "__func__", thing)  # a static method
    if thing is sys.modules or thing is os.environ:
        return "sys.modules" if thing is sys.modules else "os.environ"
    if isinstance(thing, type(sys)):
        is_stand_in = thing.__name__ == "unsloth" and thing.__spec__.loader is None
        return f"unsloth, a stand-in made in {thing.__spec__.origin}" if is_stand_in else thing.__name__
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else repr(thing)
