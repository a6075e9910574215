"""
Scripts that stay as they are: one line in front of them, and Unsloth's loaders and TRL's trainer are ours.

    import accelerate_unsloth
    accelerate_unsloth.enable_multi_gpu()
    from unsloth import FastLanguageModel
    from trl import SFTTrainer

The same classes as with the explicit imports are put in place, in memory and through the ledger, so that
`disable_multi_gpu()` can take them out again.
"""

import os
from dataclasses import dataclass
from typing import Any

from ..engines import environment
from ..launch import command
from ..launch.topology import topology
from ..patches import Patch, ledger
from ..plugin import PREFIX, UnslothPlugin
from ..reliability import failures
from . import status
from .options import BackendChoice, Options, resolve_backend

# Options that are read from the environment when the engine is loaded, before any trainer sees a plugin.
_READ_AT_LOADING = ("engine", "log_on_each_rank")


@dataclass(frozen=True)
class _Active:
    options: Options
    plugin: UnslothPlugin
    backend: BackendChoice
    patches: list[Patch]


_active: _Active | None = None


class Enabled:
    """What [`enable_multi_gpu`] returns: as a context manager it disables again what that call enabled."""

    def __init__(self, made_it: bool):
        self._made_it = made_it

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *error) -> None:
        if self._made_it:
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
    Let the rest of an Unsloth script run on all processes of this launch. Call it before importing unsloth and trl.

    Args:
        num_gpus (`int`, *optional*):
            Processes that the script wants, on all machines. Nothing is started: a process without a launcher ends
            with exit status 2 and the command to type. By default any launch is taken as it is.
        batch_size_per_gpu (`int`, *optional*):
            Wins over the script's `per_device_train_batch_size`.
        ddp_backend (`str`, *optional*, defaults to `"nccl"`):
            `"nccl"` or `"gloo"`, for the process group, unless the script's own arguments name one. On a CPU it is
            `"gloo"`, and the status says so.
        enable_memory_optimization (`bool`, *optional*, defaults to `True`):
            `True` leaves on what saves memory by default: expandable segments in the CUDA allocator of the Unsloth
            engine, and gradients that are views of DDP's buckets under `gradient_sync="overlapped"`. `False` turns
            both off, except for an allocator that the environment configures.
        enable_gradient_checkpointing (`bool`, *optional*):
            Wins over the script's choice, in the loading calls and in the trainer's arguments.
        find_unused_parameters (`bool`, *optional*):
            The plugin's option of that name, and wins over it.
        plugin ([`UnslothPlugin`], *optional*):
            All other options; by default those of the environment. A trainer's own `plugin=` wins.

    Returns:
        [`Enabled`]: for `with`, which restores everything at its end, also after an error.

    Raises:
        ValueError: for an unknown value, a launch of another size, or fewer visible GPUs than asked for.
        RuntimeError: if it is enabled with other options already, or the script has imported unsloth or trl before.
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
    options = Options(
        num_gpus=num_gpus,
        batch_size_per_gpu=batch_size_per_gpu,
        ddp_backend=ddp_backend,
        enable_memory_optimization=enable_memory_optimization,
        enable_gradient_checkpointing=enable_gradient_checkpointing,
        find_unused_parameters=find_unused_parameters,
        plugin=plugin,
    )
    if _active is not None:
        _refuse_other_options(options)
        return Enabled(made_it=False)
    command.require(options.num_gpus, status.visible_gpus())
    _enable(options)
    return Enabled(made_it=True)


def disable_multi_gpu() -> None:
    """
    Put back every attribute that [`enable_multi_gpu`] replaced; without it, do nothing.

    The engine stays loaded, and with it what the engine itself has patched (see `get_multi_gpu_status()`): the report
    of errors once per launch, and caches on this rank's GPU only. Names that a script has imported meanwhile stay what
    they are.

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
        ledger.undo(_active.patches)
        _active = None


def is_multi_gpu_enabled() -> bool:
    """Whether [`enable_multi_gpu`] is in force."""
    return _active is not None


def get_active_config() -> dict[str, Any] | None:
    """
    The options in force, as `enable_multi_gpu(**config)` takes them.

    Returns:
        `dict[str, Any]`, or `None` if it is not enabled.
    """
    return None if _active is None else _active.options.as_arguments()


def get_multi_gpu_status() -> dict[str, Any]:
    """
    Where this process stands, and what is changed in memory.

    Returns:
        `dict[str, Any]`: `enabled`, `world_size`, `rank`, `device` of this rank, `visible_devices`, and `patches`: each
        patched attribute with the name of its original. While enabled also `engine`, `ddp_backend`, both with their
        reasons, and `plugin`.

    Example:

    ```python
    >>> import accelerate_unsloth
    >>> accelerate_unsloth.get_multi_gpu_status()["enabled"]
    False
    ```
    """
    described = {"enabled": _active is not None} | status.place() | {"patches": status.patches()}
    if _active is not None:
        described |= status.decisions(_active.plugin, _active.backend)
    return described


def _refuse_other_options(options: Options) -> None:
    now, asked = _active.options.as_arguments(), options.as_arguments()
    differences = [f"{name}={asked[name]!r} instead of {now[name]!r}" for name in now if asked[name] != now[name]]
    if differences:
        raise RuntimeError(
            f"enable_multi_gpu() is in force already, and this call asks for {', '.join(differences)}. Call "
            "disable_multi_gpu() first, or give all options in one call."
        )


def _environment(options: Options, plugin: UnslothPlugin) -> dict[str, str]:
    """Variables that the engine reads when it is loaded."""
    variables = {}
    if options.plugin is not None:
        variables = {PREFIX + name.upper(): str(getattr(plugin, name)) for name in _READ_AT_LOADING}
    if not options.enable_memory_optimization and not environment.allocator_is_configured():
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
    return variables


def _enable(options: Options) -> None:
    """Load the engine and install the patches: all of them, or none."""
    global _active
    plugin, patches = options.resolve_plugin(), []
    try:
        for name, value in _environment(options, plugin).items():
            patches.append(ledger.patch(os.environ, name, value))
        from . import points  # loads the engine

        on_cpu = status.visible_gpus() == 0
        backend = resolve_backend(options.ddp_backend, topology().world_size, on_cpu)
        points.install(options, plugin, backend, on_cpu, patches)
    except BaseException:
        ledger.undo(patches)
        raise
    _active = _Active(options, plugin, backend, patches)
