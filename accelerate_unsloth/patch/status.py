"""What `get_multi_gpu_status()` shows."""

import os
import sys
from dataclasses import asdict
from typing import Any

from ..launch.topology import topology, uses_cpu
from ..patches import ledger

_NAMES_OF_MAPPINGS = {id(sys.modules): "sys.modules", id(os.environ): "os.environ"}


def visible_gpus() -> int:
    """GPUs that this process may use: none in a launch that was told to stay on the CPU."""
    import torch

    return 0 if uses_cpu() else torch.cuda.device_count()


def place() -> dict[str, Any]:
    gpus = visible_gpus()
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    own = devices[topology().local_rank] if topology().local_rank < len(devices) else devices[0]
    return {
        "world_size": topology().world_size,
        "rank": topology().rank,
        "device": own,
        "visible_devices": devices,
    }


def decisions(plugin, backend) -> dict[str, Any]:
    from ..engines.loaded import choice

    return {"engine": asdict(choice), "ddp_backend": asdict(backend), "plugin": asdict(plugin)}


def patches() -> list[dict[str, str]]:
    """One entry a patch: the attribute, the name of its original, and of what is there now."""
    return [
        {
            "patched": f"{_name(patch.owner)}.{patch.name}",
            "original": _name(patch.original) if patch.had_original else "absent",
            "now": _name(patch.replacement),
        }
        for patch in ledger.patches
    ]


def _name(thing: Any) -> str:
    if id(thing) in _NAMES_OF_MAPPINGS:
        return _NAMES_OF_MAPPINGS[id(thing)]
    if isinstance(thing, str):
        return repr(thing)
    if isinstance(thing, type(sys)):
        origin = getattr(thing.__spec__, "origin", None)
        stands_in = (
            origin is not None and "accelerate_unsloth" in origin and not thing.__name__.startswith("accelerate")
        )
        return f"{thing.__name__}, a stand-in made in {origin}" if stands_in else thing.__name__
    thing = getattr(thing, "__func__", thing)  # a static method
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    return repr(thing)
