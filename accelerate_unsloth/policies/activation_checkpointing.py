"""
In how many layers activations are recomputed in the backward, instead of kept for it.

Recomputing all of them costs about a third of a step's arithmetic. It pays only as far as micro-batches without it would be so
small that launching their kernels takes longer than running them. The first layers recompute: their backward is the last,
when what the others kept is free again. Nearly every Unsloth script asks for it, because the
notebooks do; that is read as "save memory if needed". A script that switches it off is obeyed.
"""

from dataclasses import dataclass

from ..data.packing import LAUNCH_BOUND_TOKENS

_RECOMPUTE = 1 / 3


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    longest_tokens: int  # of a sample
    rank_tokens: float  # mean of a rank in an optimizer step
    kept_tokens: int | None = None  # largest micro-batch with activations kept; None if memory is not planned
    recomputed_tokens: int | None = None  # and with all recomputed
    switched_off: bool = False  # by the script
    asked_for: bool | str | None = None  # the script's use_gradient_checkpointing, if it passed one
    can_fall_back: bool = True  # whether a micro-batch that does not fit can be repeated with recomputation
    keep_because: str = ""  # why this model must keep activations, as one clause
    partial_tokens: tuple[int, ...] = ()  # largest with 1, 2, ... of the layers recomputed, up to all but one


@dataclass(frozen=True)
class CheckpointingChoice:
    mode: str  # "none" | "unsloth" | "unchanged"
    reason: str  # one clause, shown in the start-up table
    may_recompute: bool = False  # whether recomputing all is the fallback where keeping activations does not fit
    layers: int | None = None  # that recompute, where it is some of them; the first ones
    of_layers: int | None = None

    @property
    def label(self) -> str:
        """Return the decision as the start-up table shows it."""
        return self.mode if self.layers is None else f"{self.layers} of {self.of_layers} layers"


def step_cost(rank_tokens: float, token_budget: int, recomputed: float) -> float:
    """
    Estimate the time of one rank's step, in tokens of a large micro-batch without recomputation.

    `recomputed` is the part of the layers, 0 to 1, that recompute.

    Example:

    ```python
    >>> from accelerate_unsloth.policies.activation_checkpointing import step_cost
    >>> step_cost(8192, 8192, 0), step_cost(8192, 1024, 0)
    (8192.0, 32768.0)
    ```
    """
    if token_budget <= 0:
        return float("inf")
    micro_batches = max(1, -(-rank_tokens // token_budget))
    return micro_batches * max(rank_tokens / micro_batches, LAUNCH_BOUND_TOKENS) * (1 + _RECOMPUTE * recomputed)


def _fastest(facts: Facts) -> tuple[int, int]:
    """Return the fewest recomputed layers with the shortest step that holds the longest sample, and the number of all."""
    fitting = [facts.kept_tokens, *facts.partial_tokens, facts.recomputed_tokens]
    every = len(fitting) - 1
    possible = [layers for layers, tokens in enumerate(fitting) if tokens >= facts.longest_tokens]
    # Where not even recomputing all of them seems to be enough, the probe decides.
    return min(
        possible or [every], key=lambda layers: step_cost(facts.rank_tokens, fitting[layers], layers / every)
    ), every


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
    layers, of_layers = _fastest(facts)
    if layers:
        reason = f"only {kept:,} tokens fit without it, too few to fill the GPU"
        if facts.longest_tokens > kept:
            reason = f"the longest sample has {facts.longest_tokens} tokens, and {kept} fit without it"
        if layers == of_layers:
            return CheckpointingChoice("unsloth", reason)
        reason += f"; {facts.partial_tokens[layers - 1]:,} fit with it"
        return CheckpointingChoice("unsloth", reason, True, layers, of_layers)
    reason = f"{kept:,} tokens fit without it, and recomputing costs a third"
    if facts.asked_for:
        variable = "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING=unsloth"
        reason = (
            f"{kept:,} tokens fit without it (the script asked for {facts.asked_for!r}; set {variable} to keep it)"
        )
    return CheckpointingChoice("none", reason, may_recompute=True)
