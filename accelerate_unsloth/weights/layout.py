"""The place of a tensor in memory that processes share."""

import json
import math
from dataclasses import astuple, dataclass

import torch

ALIGNMENT = 256  # of each tensor, in bytes, for kernels that load many values at a time


def rounded_up(nbytes: int, multiple: int = ALIGNMENT) -> int:
    return -(-nbytes // multiple) * multiple


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor of any type, of shape `(nbytes,)`: as floats, NaN patterns might change."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class Piece:
    """
    A parameter, or a part of its quantization state.

    Args:
        name (`str`): Path in the model.
        parameter (`str`): Path of the parameter that it belongs to.
        offset (`int`): In bytes.
        shape (`tuple[int, ...]`): Its shape.
        dtype (`str`): Such as `"bfloat16"`.
        layer (`int`): Index of the decoder layer that it belongs to.

    Example:

    ```python
    >>> import torch
    >>> from accelerate_unsloth.weights.layout import Piece
    >>> Piece("head.weight", "head.weight", 4, (1, 2), "uint8", 0).view(torch.arange(8, dtype=torch.uint8))
    tensor([[4, 5]], dtype=torch.uint8)
    ```
    """

    name: str
    parameter: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    layer: int

    @classmethod
    def of(cls, name: str, parameter: str, offset: int, tensor: torch.Tensor, layer: int) -> "Piece":
        return cls(name, parameter, offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), layer)

    @property
    def is_state(self) -> bool:
        """Whether it is a part of a quantization state."""
        return self.name != self.parameter

    @property
    def is_small(self) -> bool:
        """Whether every rank holds its own copy: of a quantization state, a bias, the weight of a norm."""
        return self.is_state or len(self.shape) < 2

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.torch_dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor in `memory`, which is of bytes."""
        return self.of_bytes(memory[self.offset : self.end])

    def of_bytes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tensor that bytes are. Autograd takes it for a tensor without relatives."""
        return values.view(self.torch_dtype).view(self.shape).data


def as_bytes(pieces: list[Piece]) -> torch.Tensor:
    """Return pieces as bytes that [`from_bytes`] reads, of shape `(nbytes,)` and type `uint8`."""
    return torch.frombuffer(bytearray(json.dumps([astuple(piece) for piece in pieces]).encode()), dtype=torch.uint8)


def from_bytes(table: torch.Tensor) -> list[Piece]:
    entries = json.loads(table.numpy().tobytes())
    return [Piece(name, parameter, offset, tuple(shape), *rest) for name, parameter, offset, shape, *rest in entries]
