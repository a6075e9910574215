"""
Memory of a GPU that the other processes of a node copy from, by CUDA IPC and peer access.

It is the driver's own memory, because PyTorch's allocator exports only what lies in its segments, and importing those opens a
context on the other GPU. It stays until the process ends, since a peer may copy from it at any time. A process that ends
first waits for the others for a minute; what they have opened stays readable after that on the systems that were tried (driver
580, H200), though CUDA does not promise it.
"""

import atexit
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..launch.channel import channel
from ..launch.topology import topology
from . import cuda_ipc
from .layout import ALIGNMENT, bytes_of, rounded_up

_GRANULE = 2**21  # of a region: the driver takes smaller ones from blocks, which it exports as a whole
_WAIT_AT_EXIT_S = 60


class DeviceMemory:
    """
    Memory of this process's GPU, one region for each call of [`put`].

    Args:
        device (`torch.device`): The GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._regions: dict[int, torch.Tensor] = {}  # by the offset of their first byte
        self._nbytes = 0

    def put(self, tensors: list[torch.Tensor]) -> list[int]:
        """
        Write tensors of any type behind one another, and return their offsets in bytes.

        Raises:
            torch.OutOfMemoryError: if the GPU does not hold them.
        """
        sizes = [rounded_up(tensor.nbytes) for tensor in tensors]
        begins = [sum(sizes[:index]) for index in range(len(sizes))]
        region = cuda_ipc.allocated(rounded_up(sum(sizes), _GRANULE), self._device)
        for begin, tensor in zip(begins, tensors, strict=True):
            region[begin : begin + tensor.nbytes].copy_(bytes_of(tensor))
        base, self._nbytes = self._nbytes, self._nbytes + region.numel()
        self._regions[base] = region
        return [base + begin for begin in begins]

    def address(self) -> list[list[Any]]:
        """Return what another process of this node needs to copy from it, once all writes have ended."""
        torch.cuda.synchronize(self._device)
        return [[begin, cuda_ipc.handle_of(region)] for begin, region in self._regions.items()]

    def view(self, begin: int, end: int) -> torch.Tensor:
        """Return bytes of one region, of shape `(end - begin,)`."""
        base = _base_of(begin, self._regions)
        return self._regions[base][begin - base : end - base]


class PeerMemory:
    """
    The memory of another process of this node.

    Args:
        address (`list`): [`DeviceMemory.address`] there.
        device (`torch.device`): The GPU of this process.

    Raises:
        RuntimeError: if this process cannot open it.
    """

    def __init__(self, address: list[list[Any]], device: torch.device):
        self._device = device
        self._pointers = {begin: cuda_ipc.opened(handle, device) for begin, handle in address}

    def source(self, begin: int, end: int) -> "PeerSource":
        """Return bytes of one region."""
        base = _base_of(begin, self._pointers)
        return PeerSource(self._pointers[base] + begin - base, end - begin, self._device)


@dataclass(frozen=True)
class PeerSource:
    """Bytes in the memory of another GPU, of which PyTorch must not know: it would use that GPU to copy them."""

    pointer: int
    nbytes: int
    device: torch.device  # of this process

    def copy_to(self, target: torch.Tensor) -> None:
        cuda_ipc.copy(self.pointer, self.nbytes, target)

    def on_host(self) -> torch.Tensor:
        target = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self.copy_to(target)
        return target.cpu()


def why_no_copies(device: torch.device) -> str:
    """
    Return why not all processes of this node can copy from one another's GPU, as a clause; empty if they can.

    All of them call it together, because each copies a few bytes from every other GPU.
    """
    place, problem, address, size = topology(), "", [], ALIGNMENT
    marks = {rank: position % 256 for position, rank in enumerate(place.node_ranks)}
    try:
        memory = DeviceMemory(device)
        memory.put([torch.full((size,), marks[place.rank], dtype=torch.uint8)])
        address = memory.address()
    except (ImportError, RuntimeError) as error:
        problem = str(error)
    addresses = channel().gather("peer memory made", address, place.node_ranks)
    for rank, other in zip(place.node_ranks, addresses, strict=True):
        if rank == place.rank or not other or problem:
            continue
        try:
            found = PeerMemory(other, device).source(0, size).on_host()
            if set(found.tolist()) != {marks[rank]}:
                problem = f"rank {place.rank} read other bytes than rank {rank} wrote"
        except RuntimeError as error:
            problem = f"rank {place.rank} cannot copy from the GPU of rank {rank}: {error}"
    return next(filter(None, channel().gather("peer memory read", problem, place.node_ranks)), "")


@cache
def stay_while_read() -> None:
    """At the end of this process, wait for the other ranks, which may still copy from its GPU, but not for ever."""
    atexit.register(_meet_at_exit)


def _meet_at_exit() -> None:
    with suppress(Exception):  # such as a store that is gone
        channel().meet("frozen weights not read any more", _WAIT_AT_EXIT_S)


def _base_of(offset: int, bases: Iterable[int]) -> int:
    """Return where the region begins that an offset is in."""
    return max(base for base in bases if base <= offset)
