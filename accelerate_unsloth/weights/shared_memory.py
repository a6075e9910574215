"""
Memory that the processes of a node share: anonymous, so that it is gone with the last process that maps it.

It needs no space in /dev/shm, of which containers have 64 MiB by default. Other processes of the same user open it through
/proc. Linux only.
"""

import mmap
import os
import secrets
from typing import Any

import torch

from .layout import bytes_of, rounded_up

_LARGEST_WRITE = 2**30  # Linux writes 2 GiB at most at once


class SharedMemory:
    """
    Memory of this process that grows with what is appended, and that others can map.

    Example:

    ```python
    >>> import torch
    >>> from accelerate_unsloth.weights.shared_memory import SharedMemory, mapped
    >>> with SharedMemory() as memory:
    ...     offset = memory.append(torch.tensor([1.0, 2.0]))
    ...     seen = mapped(memory.address())
    >>> seen[offset : offset + 8].view(torch.float32)
    tensor([1., 2.])
    ```
    """

    def __init__(self):
        self._name = f"accelerate_unsloth-{secrets.token_hex(8)}"
        self._descriptor = os.memfd_create(self._name)
        self._nbytes = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Close it here. Those who have mapped it keep it."""
        os.close(self._descriptor)

    def put(self, tensors: list[torch.Tensor]) -> list[int]:
        """Write tensors of any type behind one another, and return their offsets in bytes."""
        return [self.append(tensor) for tensor in tensors]

    def append(self, tensor: torch.Tensor) -> int:
        """Write a tensor of any type, and return its offset in bytes."""
        begin = offset = rounded_up(self._nbytes)
        left = memoryview(bytes_of(tensor.cpu()).numpy())
        while left:
            written = os.pwrite(self._descriptor, left[:_LARGEST_WRITE], offset)
            left, offset = left[written:], offset + written
        self._nbytes = offset
        return begin

    def address(self) -> dict[str, Any]:
        """Return what another process of this node needs to map the memory as it is now."""
        return {"pid": os.getpid(), "descriptor": self._descriptor, "name": self._name, "nbytes": self._nbytes}


def mapped(address: dict[str, Any], private: bool = True) -> torch.Tensor:
    """
    Map the memory of a process of this node.

    Args:
        address (`dict`): [`SharedMemory.address`] of a process that has not closed it.
        private (`bool`, *optional*, defaults to `True`):
            Whether what this process writes to it stays in this process. Memory that is pinned must not be private: pinning
            copies private pages.

    Returns:
        `torch.Tensor` of shape `(nbytes,)` and type `uint8`.

    Raises:
        RuntimeError: if it cannot be opened, as from another container.
    """
    if not address["nbytes"]:
        return torch.empty(0, dtype=torch.uint8)
    path = f"/proc/{address['pid']}/fd/{address['descriptor']}"
    try:
        found = os.readlink(path)
        if address["name"] not in found:
            raise OSError(f"{path} is {found}")
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        raise RuntimeError(
            f"Process {os.getpid()} cannot open the memory of process {address['pid']}, which holds frozen weights ({error}). "
            "The processes of a node must run as one user and in one container. Else set "
            "ACCELERATE_UNSLOTH_FROZEN_WEIGHTS=replicated."
        ) from error
    access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
    try:
        return torch.frombuffer(mmap.mmap(descriptor, address["nbytes"], access=access), dtype=torch.uint8)
    finally:
        os.close(descriptor)
