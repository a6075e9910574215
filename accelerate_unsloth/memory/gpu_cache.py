"""GPU memory that PyTorch keeps for shapes that do not come again soon."""

import gc

# Less than this part of the GPU is not worth the new allocations that follow.
_LARGE = 0.1
# With so much free memory the next phase does not need what the last one left.
_PLENTY = 0.25


def is_in_the_way(cached_bytes: int, free_bytes: int, total_bytes: int) -> bool:
    """
    Return whether giving PyTorch's cache back helps what comes next.

    Args:
        cached_bytes (`int`): Reserved by PyTorch, and not in use.
        free_bytes (`int`): Not reserved by any process.
        total_bytes (`int`): Of the GPU.

    Example:

    ```python
    >>> from accelerate_unsloth.memory.gpu_cache import is_in_the_way
    >>> is_in_the_way(8, 1, 24), is_in_the_way(8, 12, 24)
    (True, False)
    ```
    """
    return cached_bytes > _LARGE * total_bytes and free_bytes < _PLENTY * total_bytes


def release() -> None:
    """Give back all memory that no tensor uses."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def release_if_in_the_way(device) -> None:
    """
    Give the cache back between training and evaluation, where it is large and the GPU is nearly full.

    Blocks of the one rarely fit the micro-batches of the other, so the GPU would hold both sets. PyTorch frees them only
    when an allocation fails.
    """
    import torch

    if device.type != "cuda":
        return
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if is_in_the_way(cached, *torch.cuda.mem_get_info(device)):
        torch.cuda.empty_cache()
