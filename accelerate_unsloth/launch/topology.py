"""Rank and node of this process in the launch."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

_LOCAL_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@dataclass(frozen=True)
class Topology:
    """Rank and node of one process in the launch."""

    rank: int = 0  # index of this process among all processes
    world_size: int = 1  # number of processes on all nodes
    local_rank: int = 0  # index of this process on its node
    local_world_size: int = 1  # number of processes on this node
    node: int = 0  # index of this node
    local_main: int = 0  # rank of the first process on this node
    neighbours: tuple[int, ...] = field(default=(), compare=False)  # of this node, where they may not be consecutive

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Topology":
        """Read the variables that torchelastic sets. Unless [`is_located`], only `rank` and `world_size` are reliable."""
        environment = os.environ if environment is None else environment

        def read(name, default):
            return int(environment.get(name, default))

        rank, world_size = read("RANK", 0), read("WORLD_SIZE", 1)
        local_rank = read("LOCAL_RANK", rank)
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=read("LOCAL_WORLD_SIZE", world_size),
            node=read("GROUP_RANK", 0),
            local_main=rank - local_rank,
        )

    @classmethod
    def from_hosts(cls, hosts: list[str], rank: int, environment: Mapping[str, str] | None = None) -> "Topology":
        """
        Find out from the host names of all ranks, in rank order, which of them share a node.

        `LOCAL_RANK`, where `environment` has it, decides the local rank.
        """
        environment = os.environ if environment is None else environment
        neighbours = [other for other, host in enumerate(hosts) if host == hosts[rank]]
        return cls(
            rank=rank,
            world_size=len(hosts),
            local_rank=int(environment.get("LOCAL_RANK", neighbours.index(rank))),
            local_world_size=len(neighbours),
            node=list(dict.fromkeys(hosts)).index(hosts[rank]),
            local_main=neighbours[0],
            neighbours=tuple(neighbours),
        )

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """Ranks of this node, in the order of their local ranks."""
        return self.neighbours or tuple(range(self.local_main, self.local_main + self.local_world_size))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.rank == self.local_main


_place: Topology | None = None


def topology() -> Topology:
    """
    Return the topology of this process. Its node is known once the engine is loaded (`process.locate`).

    That of a single process is not kept: a notebook's kernel asks for it too, before several processes are forked from it.
    """
    global _place
    if _place is not None:
        return _place
    place = Topology.from_environment()
    if place.world_size > 1:
        _place = place
    return place


def relocate(place: Topology) -> None:
    """Replace the topology that was read from the environment."""
    global _place
    _place = place


def is_located(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether the launcher tells which ranks share a node. `srun` and `mpirun` do not set all variables."""
    environment = os.environ if environment is None else environment
    alone = int(environment.get("WORLD_SIZE", 1)) == 1
    return alone or all(name in environment for name in _LOCAL_VARIABLES)


def attempt() -> str:
    """Return the attempt of the launcher: `"0"`, or more after restarts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def uses_cpu() -> bool:
    """Return whether the launch asks for the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def declare_cpu_launch() -> None:
    """
    Tell accelerate that several processes on a machine without GPUs belong together.

    accelerate's multi-process launcher does not pass `use_cpu: true` of a config file on to its processes (accelerate 1.15,
    `utils/launch.py: prepare_multi_gpu_env`). A plain `Accelerator()` then treats each of them as a separate job
    (`DistributedType.NO`), without a warning. Delete this when the launcher sets `ACCELERATE_USE_CPU` there too.

    It also names their device `cpu:0` (`state.py: set_device`), for which `model.to(device)` of PyTorch 2.14 copies every weight
    that is on `cpu` already. `ACCELERATE_TORCH_DEVICE` gives it the plain name.

    Raises:
        RuntimeError: if accelerate's state exists already and knows one process only.
    """
    world_size = Topology.from_environment().world_size  # not kept: a script may set the variables later
    if world_size == 1:
        return
    if not uses_cpu():
        import torch

        if torch.accelerator.is_available():
            return
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    state = sys.modules.get("accelerate.state")
    if state is not None and state.PartialState._shared_state and state.PartialState().num_processes == 1:
        raise RuntimeError(
            f"The launcher started {world_size} processes without GPUs, but an Accelerator() or PartialState() that was "
            "created before accelerate_unsloth was imported treats each of them as a separate job. Import "
            "accelerate_unsloth first, or set ACCELERATE_USE_CPU=true before the launch."
        )
