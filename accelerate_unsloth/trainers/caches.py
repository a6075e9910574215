"""GPU memory that PyTorch keeps for shapes that do not come again soon."""

import torch

# Less than this is not worth the new allocations that follow.
_LARGE = 0.1
# With so much free memory the next phase does not need what the last one left.
_PLENTY = 0.25


def is_in_the_way(cached_bytes: int, free_bytes: int, total_bytes: int) -> bool:
    """
    Whether giving PyTorch's cache back helps what comes next.

    Args:
        cached_bytes (`int`): Reserved by PyTorch, and not in use.
        free_bytes (`int`): Held by nobody.
        total_bytes (`int`): Of the GPU.

    Example:

    ```python
    >>> from accelerate_unsloth.trainers.caches import is_in_the_way
    >>> is_in_the_way(8, 1, 24), is_in_the_way(8, 12, 24)
    (True, False)
    ```
    """
    return cached_bytes > _LARGE * total_bytes and free_bytes < _PLENTY * total_bytes


def free_if_in_the_way(device: torch.device) -> None:
    """
    Give the cache back where training and evaluation take turns; nothing on a CPU.

    The blocks were cut for the micro-batches of the one and rarely fit those of the other, so that the GPU holds both
    sets. PyTorch would notice only when an allocation fails, or run out because its blocks are in pieces.
    """
    if device.type != "cuda":
        return
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if is_in_the_way(cached, *torch.cuda.mem_get_info(device)):
        torch.cuda.empty_cache()
