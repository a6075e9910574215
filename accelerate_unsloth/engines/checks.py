"""Checks of what a script passes to the loaders, and of the device that a loaded model is on."""

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..launch.topology import topology
from ..patches import patch_log
from ..weights import placed_weights

_OURS = {f"{name}Trainer" for name in ("SFT", "DPO", "Reward", "KTO", "ORPO", "CPO")}


def this_device() -> str:
    """Return this rank's device, such as `"cuda:1"`, or `"cpu"`."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def check_loading(model_name: str | None, options: Mapping[str, Any]) -> None:
    """Raise an error for arguments of `from_pretrained` that this package or this launch does not support."""
    if model_name is not None:
        check_model_name(model_name)
    if offloaded := options.get("offload_layers"):
        raise ValueError(
            f"offload_layers={offloaded!r} moves layers in and out of the GPU, with one copy in host memory per process. "
            "accelerate_unsloth does not support that. Leave it out. If the model does not fit, load it in 4 bits or "
            "shorten the samples."
        )
    check_device_map(options.get("device_map"), topology().world_size, this_device())


def note_stock_trainers() -> None:
    """
    Let rank 0 say if a trainer that we have is the stock one, and trains a model that our loaders have loaded.

    Call it once Unsloth has loaded a model, because it wraps the same function then.
    """
    from transformers import Trainer

    if topology().world_size == 1 or patch_log.holds(Trainer, "__init__"):
        return
    original = Trainer.__init__

    @functools.wraps(original)
    def noting(self, model=None, *args, **kwargs):
        original(self, model, *args, **kwargs)
        name = type(self).__name__.removeprefix("Unsloth")
        is_stock = name in _OURS and not hasattr(self, "adapter_class") and placed_weights(self.model) is not None
        if is_stock and topology().is_main:
            config = name.replace("Trainer", "Config")
            print(
                f"accelerate_unsloth: this {name} is TRL's own. It trains with DistributedDataParallel, and none of our promises "
                f"hold. Import {name} and {config} from accelerate_unsloth."
            )

    patch_log.patch(Trainer, "__init__", noting)


def check_model_name(model_name: str) -> None:
    """Raise `FileNotFoundError` for a path that does not exist, before a loader takes it for a hub id."""
    is_path = os.path.isabs(model_name) or model_name.startswith((".", "~")) or model_name.count("/") > 1
    if is_path and not os.path.exists(model_name):
        raise FileNotFoundError(
            f"model_name={model_name!r} is a path that does not exist on this machine. Give an existing folder, or a "
            "hub id such as 'unsloth/Llama-3.2-1B-Instruct'."
        )


def check_device_map(device_map: Any, world_size: int, own_device: str) -> None:
    """Raise `ValueError` if one of several processes would load a part of the model outside of its own device."""
    if world_size == 1 or device_map in (None, "sequential"):  # what Unsloth loads by default
        return
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if {_name(device) for device in devices} <= {own_device, own_device.split(":")[0]}:
        return
    raise ValueError(
        f"device_map={device_map!r} does not put the whole model on {own_device}, but this launch has {world_size} "
        "processes and each one owns a single device. Remove device_map, or start one process to split the model."
    )


def check_placement(devices: Iterable[Any], own_device: str) -> None:
    """Raise `RuntimeError` if a parameter was loaded onto another rank's device."""
    elsewhere = sorted({_name(device) for device in devices} - {own_device, "cpu", "meta"})
    if elsewhere:
        raise RuntimeError(
            f"The model was loaded onto {', '.join(elsewhere)}, but this process owns {own_device}. Report this with "
            "your Unsloth version: several processes on one GPU would run out of its memory."
        )


def _name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)
