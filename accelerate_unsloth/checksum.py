"""Whether tensors are the same on all ranks, by 8 bytes each."""

from collections.abc import Mapping

import torch

# PyTorch copies integers to 8 bytes each before it sums them (ReduceOps.cpp, torch 2.11): a piece at a time.
_PIECE = 2**24

_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """
    A checksum of each tensor: the sum of its bits taken as integers, so equal bits give equal sums on any device.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): Of any shapes and types.

    Returns:
        `dict[str, int]`: under the same names, in one copy from each device.

    Example:

    ```python
    >>> import torch
    >>> from accelerate_unsloth.checksum import bit_sums
    >>> bit_sums({"weight": torch.tensor([1, 2])})
    {'weight': 3}
    ```
    """
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, {})[name] = _bit_sum(tensor.detach())
    sums = {}
    for device_sums in by_device.values():
        sums |= dict(zip(device_sums, torch.stack([*device_sums.values()]).tolist(), strict=True))
    return {name: sums[name] for name in tensors}


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1).view(_SAME_SIZE_INTEGER.get(tensor.element_size(), torch.uint8))
    return sum(
        (piece.sum(dtype=torch.int64) for piece in flat.split(_PIECE)),
        start=torch.zeros((), dtype=torch.int64, device=tensor.device),
    )
