"""
When ranks meet to reduce gradients.

`after_backward`: ranks compute on their own and meet once per optimizer step, in one flat all-reduce. No collective
runs inside a forward or a backward, so nothing that happens there on one rank alone can break or hang the others. It
costs one float32 copy of the gradients, and the reduction is not hidden behind the backward: with LoRA both are small.

`overlapped`: DistributedDataParallel reduces buckets while the last backward runs. For full fine-tuning, where the
gradients are as large as the model. Not for adapters, however large: DDP has to search for the parameters that a step
skips, and that breaks reentrant checkpointing ("marked as ready twice").
"""

from dataclasses import dataclass

# 2**28 float32 values: 1 GiB of buffer, and about 5 ms a step over NVLink or 100 ms over PCIe.
AFTER_BACKWARD_MAX_TRAINABLE = 2**28


@dataclass(frozen=True)
class GradientSyncChoice:
    mode: str  # "none" | "after_backward" | "overlapped"
    reason: str  # one clause, shown in the start-up table


def resolve(
    requested: str, world_size: int, trainable: int, total: int, loss_takes_item_count: bool
) -> GradientSyncChoice:
    """
    Choose how gradients are reduced.

    Args:
        requested (`str`): `"auto"`, `"after_backward"` or `"overlapped"`.
        world_size (`int`): Number of processes.
        trainable (`int`): Number of trainable values.
        total (`int`): Number of all values of the model.
        loss_takes_item_count (`bool`):
            Whether the loss is known to divide by a given token count (`num_items_in_batch`). If it only takes means,
            DDP's average of them is not the mean over all tokens.

    Raises:
        ValueError: if `"overlapped"` is asked for with a model whose loss it cannot keep exact.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import gradient_sync
    >>> gradient_sync.resolve("auto", 4, trainable=42_000_000, total=8_000_000_000, loss_takes_item_count=True).mode
    'after_backward'
    ```
    """
    if world_size == 1:
        return GradientSyncChoice("none", "one process")
    if requested == "overlapped" and not loss_takes_item_count:
        raise ValueError(
            "gradient_sync='overlapped' averages the ranks' losses, and it is exact only for a loss of TRL's or Unsloth's that "
            "takes num_items_in_batch. This model's forward does not take it, or the loss is a custom one. Use "
            "'after_backward' or 'auto'."
        )
    if requested != "auto":
        return GradientSyncChoice(requested, "asked for")
    buffer_gib = trainable * 4 / 2**30
    if not loss_takes_item_count:
        return GradientSyncChoice("after_backward", "this loss may be a mean, which only this mode weighs exactly")
    if trainable <= AFTER_BACKWARD_MAX_TRAINABLE:
        return GradientSyncChoice("after_backward", f"gradients are small: {buffer_gib:.2f} GiB in one all-reduce")
    if trainable < total:
        return GradientSyncChoice("after_backward", f"only a part is trained: {buffer_gib:.2f} GiB in one all-reduce")
    return GradientSyncChoice("overlapped", f"gradients are large: {buffer_gib:.1f} GiB, hidden behind the backward")
