"""How the bytes of a layer reach a slot."""

from dataclasses import dataclass
from typing import Protocol

import torch

from .placement import VARIABLE

_pinned = []  # a mapping that ends while it is pinned would leave its addresses pinned


class Source(Protocol):
    """The bytes of a layer, wherever they are."""

    nbytes: int

    def copy_to(self, target: torch.Tensor) -> None:
        """Copy them to the first bytes of `target`, on the current stream of its device."""

    def on_host(self) -> torch.Tensor:
        """Return them in memory of the host, of shape `(nbytes,)` and type `uint8`."""


@dataclass(frozen=True)
class TensorSource:
    """Bytes that this process has as a tensor. A GPU copies them without the CPU only from memory that is pinned."""

    stored: torch.Tensor  # uint8

    @property
    def nbytes(self) -> int:
        return self.stored.numel()

    def copy_to(self, target: torch.Tensor) -> None:
        target[: self.nbytes].copy_(self.stored, non_blocking=True)

    def on_host(self) -> torch.Tensor:
        return self.stored.cpu()


def pin(memory: torch.Tensor) -> None:
    """
    Pin shared memory until the process ends, so that a GPU copies from it by itself.

    Raises:
        RuntimeError: if the system does not allow it.
    """
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if error:
        raise RuntimeError(
            f"{memory.numel() / 2**30:.1f} GiB of frozen weights could not be pinned (cudaHostRegister: error {error}). Raise the "
            f"limits of locked memory (`ulimit -l`) and of the container's memory, or set {VARIABLE}=replicated."
        )
    _pinned.append(memory)


def pinned_bytes() -> int:
    """Return what this process has pinned: all that the models which it has loaded share on this node, each process alike."""
    return sum(memory.numel() for memory in _pinned)


class StreamCopier:
    """
    Copies layers into slots: at once on a CPU, on a stream of its own on a GPU.

    Args:
        sources (`dict[int, Source]`): The bytes of each layer.
        slots (`list[torch.Tensor]`): Memory of the device, each at least as large as the largest layer.
    """

    def __init__(self, sources: dict[int, Source], slots: list[torch.Tensor]):
        self._sources, self._slots = sources, slots
        self._on_gpu = slots[0].is_cuda
        if self._on_gpu:
            self._stream = torch.cuda.Stream(slots[0].device)
            self._stream.wait_stream(torch.cuda.current_stream(slots[0].device))  # which may still use their memory
            for slot in slots:
                slot.record_stream(self._stream)  # freed slots are not given away while a copy is under way
            self._copied = [torch.cuda.Event() for _ in slots]
            self._computed = [torch.cuda.Event() for _ in slots]

    def begin(self, layer: int, slot: int) -> None:
        source, target = self._sources[layer], self._slots[slot]
        if not self._on_gpu:
            source.copy_to(target)
            return
        self._stream.wait_event(self._computed[slot])
        with torch.cuda.stream(self._stream):
            source.copy_to(target)
            self._copied[slot].record()

    def wait(self, slot: int) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        if self._on_gpu:
            self._computed[slot].record()
