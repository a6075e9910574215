"""
Whether activations are kept for the backward or recomputed in it.

Recomputing costs about a third of a step's arithmetic. It pays only where micro-batches without it would be so small
that launching their kernels takes longer than running them. Nearly every Unsloth script asks for it, because the
notebooks do; that is read as "save memory if needed". A script that switches it off is obeyed.
"""

from dataclasses import dataclass

from ..data.packing import LAUNCH_BOUND_TOKENS

_RECOMPUTE = 4 / 3


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    longest_tokens: int  # of a sample
    rank_tokens: float  # mean of a rank in an optimizer step
    kept_tokens: int | None = None  # largest micro-batch with activations kept; None if memory is not planned
    recomputed_tokens: int | None = None  # and with activations recomputed
    switched_off: bool = False  # by the script
    asked_for: bool | str | None = None  # the script's use_gradient_checkpointing, if it passed one
    can_fall_back: bool = True  # whether a micro-batch that does not fit can be repeated with recomputation
    keep_because: str = ""  # why this model must keep activations, as one clause


@dataclass(frozen=True)
class CheckpointingChoice:
    mode: str  # "none" | "unsloth" | "unchanged"
    reason: str  # one clause, shown in the start-up table
    may_recompute: bool = False  # whether recomputation is the fallback where keeping activations does not fit


def step_cost(rank_tokens: float, token_budget: int, checkpointing: bool) -> float:
    """
    Estimate the time of one rank's step, in tokens of a large micro-batch without recomputation.

    Example:

    ```python
    >>> from accelerate_unsloth.policies.activation_checkpointing import step_cost
    >>> step_cost(8192, 8192, False), step_cost(8192, 1024, False)
    (8192.0, 32768.0)
    ```
    """
    if token_budget <= 0:
        return float("inf")
    micro_batches = max(1, -(-rank_tokens // token_budget))
    return micro_batches * max(rank_tokens / micro_batches, LAUNCH_BOUND_TOKENS) * (_RECOMPUTE if checkpointing else 1)


def resolve(requested: str, facts: Facts) -> CheckpointingChoice:
    """
    Choose by estimated step time; `requested` is the plugin's option.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import activation_checkpointing
    >>> from accelerate_unsloth.policies.activation_checkpointing import Facts
    >>> facts = Facts(2048, 7000.0, kept_tokens=14691, recomputed_tokens=90000, asked_for="unsloth")
    >>> activation_checkpointing.resolve("auto", facts).mode
    'none'
    ```
    """
    kept = facts.kept_tokens
    if requested != "auto":
        return CheckpointingChoice(requested, "asked for")
    if facts.keep_because:
        return CheckpointingChoice("none", facts.keep_because)
    if facts.switched_off:
        return CheckpointingChoice("none", "the script switched it off")
    if kept is None:
        return CheckpointingChoice("unchanged", "memory is not planned here")
    if not facts.can_fall_back:
        return CheckpointingChoice("unchanged", "gradients are too large to repeat a micro-batch that does not fit")
    if facts.longest_tokens > kept:
        return CheckpointingChoice(
            "unsloth", f"the longest sample has {facts.longest_tokens} tokens, and {kept} fit without it"
        )
    if step_cost(facts.rank_tokens, kept, False) > step_cost(facts.rank_tokens, facts.recomputed_tokens, True):
        return CheckpointingChoice("unsloth", f"only {kept:,} tokens fit without it, too few to fill the GPU")
    reason = f"{kept:,} tokens fit without it, and recomputing costs a third"
    if facts.asked_for:
        variable = "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING=unsloth"
        reason = (
            f"{kept:,} tokens fit without it (the script asked for {facts.asked_for!r}; set {variable} to keep it)"
        )
    return CheckpointingChoice("none", reason, may_recompute=True)
