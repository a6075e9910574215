"""Which GPU a model may sit on: with several processes, each owns one, and the model has to be on it."""

from collections.abc import Iterable
from typing import Any

import torch

AUTOMATIC = (None, "sequential")


def this_device() -> str:
    """This rank's device, such as `"cuda:1"`, or `"cpu"`."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def check_device_map(device_map: Any, world_size: int, own_device: str) -> None:
    """
    Refuse a `device_map` that would split the model, in a launch where each process owns one GPU.

    Args:
        device_map (`Any`): As the user gave it.
        world_size (`int`): Number of processes.
        own_device (`str`): This rank's device, such as `"cuda:1"`.

    Raises:
        ValueError: if the map names several devices, a strategy, or a device of another rank.

    Example:

    ```python
    >>> from accelerate_unsloth.engines.placement import check_device_map
    >>> check_device_map({"": "cuda:1"}, world_size=2, own_device="cuda:1")
    ```
    """
    if world_size == 1 or device_map in AUTOMATIC:
        return
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if {_name(device) for device in devices} <= {own_device, own_device.split(":")[0]}:
        return
    raise ValueError(
        f"device_map={device_map!r} does not put the whole model on {own_device}, but this launch has {world_size} "
        "processes and each one owns a single device. Remove device_map, or start one process to split the model."
    )


def check_placement(devices: Iterable[Any], own_device: str) -> None:
    """
    Make sure that every parameter came to this rank's device.

    Raises:
        RuntimeError: if one did not.
    """
    elsewhere = sorted({_name(device) for device in devices} - {own_device, "cpu", "meta"})
    if elsewhere:
        raise RuntimeError(
            f"The model was loaded onto {', '.join(elsewhere)}, but this process owns {own_device}. Report this with "
            "your Unsloth version: several processes on one GPU would run out of its memory."
        )


def _name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)
