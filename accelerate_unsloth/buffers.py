"""Which buffers of a model are part of it, so that they are saved with it and have to be the same on all ranks."""


def kept_buffers(model) -> dict:
    """
    The buffers that a model keeps, without those that it makes anew when it is loaded.

    Args:
        model ([`~torch.nn.Module`]): The model.

    Returns:
        `dict[str, torch.Tensor]`: by name.

    Example:

    ```python
    >>> import torch
    >>> from accelerate_unsloth.buffers import kept_buffers
    >>> list(kept_buffers(torch.nn.BatchNorm1d(2)))
    ['running_mean', 'running_var', 'num_batches_tracked']
    ```
    """
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
