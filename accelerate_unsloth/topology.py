"""Where this process stands among the others."""

import os
import sys
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Topology:
    """
    The place of one process in the launch, as the launcher's environment variables give it.

    Args:
        rank (`int`): Index of this process among all processes.
        world_size (`int`): Number of processes on all nodes.
        local_rank (`int`): Index of this process on its node.
        local_world_size (`int`): Number of processes on this node.
        node (`int`): Index of this node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0

    @classmethod
    def from_environment(cls, environment=os.environ) -> "Topology":
        def read(name, default):
            return int(environment.get(name, default))

        world_size = read("WORLD_SIZE", 1)
        return cls(
            rank=read("RANK", 0),
            world_size=world_size,
            local_rank=read("LOCAL_RANK", read("RANK", 0)),
            local_world_size=read("LOCAL_WORLD_SIZE", world_size),
            node=read("GROUP_RANK", 0),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0


@lru_cache(maxsize=1)
def topology() -> Topology:
    return Topology.from_environment()


def attempt() -> str:
    """Which attempt of the launcher this is: `"0"`, or more after restarts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def uses_cpu() -> bool:
    """Whether this launch was told to stay on the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def declare_cpu_launch() -> None:
    """
    Tell accelerate that several processes on a machine without GPUs belong together.

    accelerate's multi-process launcher does not hand `use_cpu: true` of a config file on to its processes (accelerate
    1.15, `utils/launch.py: prepare_multi_gpu_env`). A plain `Accelerator()` then takes each of them for a job of its own
    (`DistributedType.NO`), without a word. Delete this when the launcher sets `ACCELERATE_USE_CPU` there too.

    Raises:
        RuntimeError: if accelerate's state exists already and knows of one process only.
    """
    world_size = topology().world_size
    if world_size == 1 or uses_cpu():
        return
    import torch

    if torch.accelerator.is_available():
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state = sys.modules.get("accelerate.state")
    if state is not None and state.PartialState._shared_state and state.PartialState().num_processes == 1:
        raise RuntimeError(
            f"The launcher started {world_size} processes without GPUs, but an Accelerator() or PartialState() that was made "
            "before accelerate_unsloth was imported takes each of them for a job of its own. Import accelerate_unsloth "
            "first, or set ACCELERATE_USE_CPU=true before the launch."
        )
