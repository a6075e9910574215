"""
How a micro-batch's loss enters the step: divided by the step's item count, or as a mean that is weighed by its items.

transformers hands a loss the number of items of the whole step (`num_items_in_batch`). Losses of TRL, Unsloth and
transformers divide by it. A custom `compute_loss` or `compute_loss_func` may instead return a mean over its micro-batch;
then the loss and the gradient would depend on how the step is split. Which of the two it does cannot be read off its
code, so it is called twice on one micro-batch, with two counts, and the two losses are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_TOLERANCE = 0.005  # of a ratio; a loss in bfloat16 is rounded to 0.4%


@dataclass(frozen=True)
class LossChoice:
    divides: bool  # whether the loss divides by the count that it is given
    reason: str  # one clause, shown in the start-up table


def own(takes_count: bool) -> LossChoice:
    """Return the choice for a loss of TRL, Unsloth or transformers."""
    if takes_count:
        return LossChoice(True, "of all ranks and micro-batches")
    return LossChoice(False, "of all ranks and micro-batches; this model's loss is a mean, weighed by its tokens")


def resolve(ratios: Sequence[float | None]) -> LossChoice:
    """
    Choose for a custom loss, by each rank's loss for twice the item count over its loss for the count; `None` if it has none.

    Raises:
        ValueError: if the loss neither divides by the count nor ignores it, or ranks differ.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import loss
    >>> loss.resolve([1.0, None]).divides, loss.resolve([0.5, 0.5]).divides
    (False, True)
    ```
    """
    known = [ratio for ratio in ratios if ratio is not None]
    if all(abs(ratio - 0.5) < _TOLERANCE for ratio in known):
        return LossChoice(True, "of all ranks and micro-batches; the custom loss divides by num_items_in_batch")
    if all(abs(ratio - 1.0) < _TOLERANCE for ratio in known):
        return LossChoice(
            False, "of all ranks; the custom loss is a mean per micro-batch, weighed by its labelled tokens"
        )
    found = ", ".join(f"{ratio:.3f}" for ratio in known)
    raise ValueError(
        "The custom compute_loss (or compute_loss_func) uses num_items_in_batch for a part of its loss only: for twice the "
        f"count it returned {found} times the loss, and 0.5 (all of it is divided by the count) or 1 (a mean over the "
        "micro-batch) can be trained exactly. Divide every term by num_items_in_batch, or none."
    )
