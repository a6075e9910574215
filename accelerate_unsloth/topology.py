"""Where this process stands among the others."""

import os
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
