"""Memory of one GPU that the process of another one reads."""

from itertools import chain

import torch

from accelerate_unsloth.launch.channel import channel
from accelerate_unsloth.weights.peer_memory import DeviceMemory, PeerMemory, why_no_copies

from .training import processes_by_gpu


def copy(case):
    """Exchange tensors of several types between two GPUs: what of them arrived, and who opened a context where."""
    device, written = torch.device("cuda", case.rank), tensors(case.rank)
    memory = DeviceMemory(device)
    offsets = [memory.put(written[:2]), memory.put(written[2:])]
    everyone = channel().gather("peers", [offsets, memory.address()])
    offsets_there, address = everyone[1 - case.rank]
    peer, expected = PeerMemory(address, device), tensors(1 - case.rank)
    slots = [torch.zeros(tensor.nbytes + 5, dtype=torch.uint8, device=device) for tensor in expected]
    for slot, begin, tensor in zip(slots, chain(*offsets_there), expected, strict=True):
        peer.source(begin, begin + tensor.nbytes).copy_to(slot)
    arrived = [
        torch.equal(slot[: tensor.nbytes].cpu(), as_bytes(tensor)) and not slot[tensor.nbytes :].any().item()
        for slot, tensor in zip(slots, expected, strict=True)
    ]
    own = [
        torch.equal(memory.view(begin, begin + tensor.nbytes).cpu(), as_bytes(tensor))
        for begin, tensor in zip(chain(*offsets), written, strict=True)
    ]
    return {"arrived": arrived, "own": own, "why": why_no_copies(device), "processes_by_gpu": processes_by_gpu()}


def tensors(rank: int) -> list[torch.Tensor]:
    """Four of them, one with the patterns of floats that are no numbers."""
    torch.manual_seed(rank)
    patterns = torch.randint(0, 255, (3, 1000), dtype=torch.uint8)
    return [patterns.view(torch.bfloat16), torch.randn(7, 3), patterns[:, :77].contiguous(), torch.randn(2**20)]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
