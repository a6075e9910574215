"""Checksums of tensors, of 8 bytes each, to compare them across ranks."""

from collections.abc import Mapping

import torch

# In pieces, because PyTorch copies integers to 8 bytes each before it sums them (ReduceOps.cpp, torch 2.11).
_PIECE = 2**22

# Each value is multiplied by its place, so that another order gives another sum. A prime below 2**16.
_PLACES = 65521

_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """
    Return a checksum of each tensor, of any shape and type: equal bits in equal places give equal sums on any device.

    They are computed on the GPU of this process, if it uses one: a core of a CPU sums 130 MB of bytes in a second.

    Example:

    ```python
    >>> import torch
    >>> from accelerate_unsloth.reliability.checksum import bit_sums
    >>> bit_sums({"weight": torch.tensor([1, 2])})
    {'weight': 5}
    ```
    """
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else tensor.device
        by_device.setdefault(device, {})[name] = tensor.detach()
    sums = {}
    for device, its_tensors in by_device.items():
        longest = min(_PIECE, max(tensor.numel() for tensor in its_tensors.values()))
        places = torch.arange(longest, device=device) % _PLACES + 1
        found = [_bit_sum(tensor, places) for tensor in its_tensors.values()]
        sums |= dict(zip(its_tensors, torch.stack(found).tolist(), strict=True))
    return {name: sums[name] for name in tensors}


def kept_buffers(model) -> dict:
    """Return the buffers in a model's state dictionary, by name, without those that it computes when it is loaded."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _bit_sum(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1).view(_SAME_SIZE_INTEGER.get(tensor.element_size(), torch.uint8))
    total = torch.zeros((), dtype=torch.int64, device=places.device)
    for piece in flat.split(_PIECE):  # integers overflow in the same way on every device
        total = total * 31 + (piece.to(places.device) * places[: len(piece)]).sum()
    return total
