"""
Whether activations are kept or recomputed in the backward.

Recomputing costs about a third of a step's arithmetic. It is worth that only where micro-batches without it would be so
small that launching their kernels takes longer than running them. Nearly every Unsloth script asks for it, because the
notebooks do; that is taken as "save memory if needed". A script that switches it off is obeyed.
"""

from dataclasses import dataclass

# Below it a micro-batch takes about as long as its launches: measured for 1B and 8B dims on an H200.
LAUNCH_BOUND_TOKENS = 4096
_RECOMPUTE = 4 / 3


@dataclass(frozen=True)
class CheckpointingChoice:
    mode: str  # "none" | "unsloth" | "unchanged"
    reason: str  # one clause, shown in the start-up table
    may_recompute: bool = False  # whether recomputing is allowed after all, where keeping activations does not fit


def step_cost(rank_tokens: float, token_budget: int, checkpointing: bool) -> float:
    """
    Estimated time of one rank's step, in tokens of a large micro-batch without recomputation.

    Args:
        rank_tokens (`float`): Tokens of a rank in a step.
        token_budget (`int`): Most tokens of a micro-batch.
        checkpointing (`bool`): Whether activations are recomputed.

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


def resolve(
    requested: str,
    switched_off: bool,
    asked_for: bool | str | None,
    without: int,
    with_: int,
    longest: int,
    rank_tokens: float,
    has_way_back: bool = True,
) -> CheckpointingChoice:
    """
    Choose by estimated time.

    Args:
        requested (`str`): `"auto"`, `"none"` or `"unsloth"`.
        switched_off (`bool`): Whether the script wants activations to be kept.
        asked_for (`bool` or `str`, *optional*): What the script passed as `use_gradient_checkpointing`, if anything.
        without (`int`): Largest micro-batch in tokens that fits without recomputation; 0 if not known.
        with_ (`int`): And with it.
        longest (`int`): Tokens of the longest sample.
        rank_tokens (`float`): Mean tokens of a rank in a step.
        has_way_back (`bool`, *optional*, defaults to `True`):
            Whether a rank that runs out of memory in a step can recompute activations from there on.

    Returns:
        [`CheckpointingChoice`]

    Example:

    ```python
    >>> from accelerate_unsloth.policies import checkpointing
    >>> checkpointing.resolve("auto", False, "unsloth", 14691, 90000, 2048, 7000.0).mode
    'none'
    ```
    """
    if requested != "auto":
        return CheckpointingChoice(requested, "asked for")
    if switched_off:
        return CheckpointingChoice("none", "the script switched it off")
    if not without:
        return CheckpointingChoice("unchanged", "memory is not planned here")
    if not has_way_back:
        return CheckpointingChoice("unchanged", "gradients are too large to repeat a micro-batch that does not fit")
    if longest > without:
        return CheckpointingChoice("unsloth", f"the longest sample has {longest} tokens, and {without} fit without it")
    if step_cost(rank_tokens, without, False) > step_cost(rank_tokens, with_, True):
        return CheckpointingChoice("unsloth", f"only {without:,} tokens fit without it, too few to fill the GPU")
    reason = f"{without:,} tokens fit without it, and recomputing costs a third"
    if asked_for:
        variable = "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING=unsloth"
        reason = f"{without:,} tokens fit without it (the script asked for {asked_for!r}; set {variable} to keep it)"
    return CheckpointingChoice("none", reason, may_recompute=True)
