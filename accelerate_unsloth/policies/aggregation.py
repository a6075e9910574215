"""What the loss of an optimizer step is, when several micro-batches on several ranks make it up."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class AggregationMethod(str, Enum):
    """
    How the losses of a step's micro-batches become one.

    - `TOKEN_MEAN`: the mean over all tokens of all ranks, however they are assigned. One process gives the same.
    - `MEAN`: the mean of the ranks' means, each the mean of its micro-batches. Ranks without data do not count.
    - `SUM`: the sum over all micro-batches.
    """

    MEAN = "mean"
    SUM = "sum"
    TOKEN_MEAN = "token_mean"


@dataclass(frozen=True)
class AggregationChoice:
    method: AggregationMethod
    reason: str  # one clause


def resolve(requested: AggregationMethod | str | None, counts_tokens: bool) -> AggregationChoice:
    """
    Choose the method; `counts_tokens` tells whether it is known which positions of a micro-batch its loss is the mean of.

    Raises:
        ValueError: for a method that is not known, or `TOKEN_MEAN` where tokens cannot be counted.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import aggregation
    >>> aggregation.resolve(None, counts_tokens=True).method
    <AggregationMethod.TOKEN_MEAN: 'token_mean'>
    ```
    """
    if requested is None:
        if counts_tokens:
            return AggregationChoice(AggregationMethod.TOKEN_MEAN, "exact on any number of processes")
        return AggregationChoice(AggregationMethod.MEAN, "which tokens the loss is the mean of is not known")
    known = [method.value for method in AggregationMethod]
    if requested not in known:
        raise ValueError(f"aggregation_method={requested!r} is not known; choose one of {', '.join(known)}.")
    method = AggregationMethod(requested)
    if method is AggregationMethod.TOKEN_MEAN and not counts_tokens:
        raise ValueError(
            "aggregation_method=TOKEN_MEAN needs to know which tokens the loss is the mean of, and this model is not one "
            "that predicts the next token. Pass count_items, a function of a batch, or choose MEAN."
        )
    return AggregationChoice(method, "asked for")


def weights(method: AggregationMethod, items: Sequence[int]) -> list[float]:
    """
    Return the weight of each micro-batch in its rank's loss, from their loss items.

    Example:

    ```python
    >>> from accelerate_unsloth.policies.aggregation import AggregationMethod, weights
    >>> weights(AggregationMethod.TOKEN_MEAN, [3, 1, 0])
    [0.75, 0.25, 0.0]
    >>> weights(AggregationMethod.MEAN, [3, 1, 0])
    [0.5, 0.5, 0.0]
    ```
    """
    present = [float(count > 0) for count in items]
    if method is AggregationMethod.SUM:
        return present
    shares = items if method is AggregationMethod.TOKEN_MEAN else present
    return [share / max(1, sum(shares)) for share in shares]


def rank_weight(method: AggregationMethod, items: Sequence[int]) -> float:
    """Return the weight of a rank among the ranks: its tokens, or one if it has any data."""
    return float(sum(items)) if method is AggregationMethod.TOKEN_MEAN else float(any(items))
