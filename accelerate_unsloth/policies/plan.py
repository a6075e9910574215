"""
The step plan: whether activations are kept, and how the effective batch is split into micro-batches.

Both follow from the same memory, so they are decided together and in one place. The trainer uses the plan with measured
memory; `ConfigManager`, `accelerate-unsloth env` and `estimate-memory` use it with the arithmetic of `memory/`.
"""

from dataclasses import dataclass, replace

from . import activation_checkpointing, micro_batch
from .activation_checkpointing import CheckpointingChoice
from .micro_batch import MicroBatchChoice


@dataclass(frozen=True)
class Facts(activation_checkpointing.Facts):
    """What a step plan depends on."""

    lengths_known: bool = True  # of each sample
    noisy: bool = False  # whether NEFTune adds noise


@dataclass(frozen=True)
class StepPlan:
    """Both choices, with the options and facts that they were made from, so that a fallback decides by the same rules."""

    checkpointing: CheckpointingChoice
    micro_batch: MicroBatchChoice
    most_tokens: int | None
    facts: Facts

    @property
    def recomputed(self) -> float:
        """Part of the layers that recompute their activations in the backward, 0 to 1."""
        choice = self.checkpointing
        if choice.mode == "unchanged":
            return float(not self.facts.switched_off)
        return choice.layers / choice.of_layers if choice.layers else float(choice.mode == "unsloth")

    def recomputing(self, why: str) -> "StepPlan | None":
        """Return the plan that recomputes all activations, where keeping some was our choice and did not fit; else `None`."""
        if not self.checkpointing.may_recompute:
            return None
        return _with_checkpointing(CheckpointingChoice("unsloth", why), "auto", self.most_tokens, self.facts)

    def confirmed(self, tokens: int) -> "StepPlan":
        """Return the plan after a micro-batch of so many tokens fitted on every rank."""
        return replace(self, micro_batch=self.micro_batch.confirmed(tokens, self.facts.longest_tokens))

    def lowered(self, tokens_that_failed: int, why: str) -> "StepPlan":
        """Return the plan after a micro-batch of so many tokens ran out of memory."""
        return replace(self, micro_batch=self.micro_batch.lowered(tokens_that_failed, self.facts.longest_tokens, why))


def plan(options, facts: Facts) -> StepPlan:
    """
    Plan a step, by the plugin's `gradient_checkpointing`, `micro_batch` and `micro_batch_tokens`.

    Raises:
        ValueError: if the longest sample is above `micro_batch_tokens`.

    Example:

    ```python
    >>> from accelerate_unsloth import UnslothPlugin
    >>> from accelerate_unsloth.policies.plan import Facts, plan
    >>> chosen = plan(UnslothPlugin(), Facts(2048, 16_384.0, kept_tokens=30_000, recomputed_tokens=90_000))
    >>> chosen.checkpointing.mode, chosen.micro_batch.token_budget
    ('none', 30000)
    ```
    """
    # Where the script fixes the micro-batches, its checkpointing stays as well.
    if micro_batch.why_fixed(options.micro_batch, facts.lengths_known, facts.noisy):
        facts = replace(facts, kept_tokens=None)
    checkpointing = activation_checkpointing.resolve(options.gradient_checkpointing, facts)
    return _with_checkpointing(checkpointing, options.micro_batch, options.micro_batch_tokens, facts)


def _with_checkpointing(
    checkpointing: CheckpointingChoice, requested: str, most_tokens: int | None, facts: Facts
) -> StepPlan:
    fixed = StepPlan(checkpointing, MicroBatchChoice("fixed", None, ""), most_tokens, facts)
    fits = facts.recomputed_tokens if fixed.recomputed else facts.kept_tokens
    if checkpointing.layers is not None:
        fits = facts.partial_tokens[checkpointing.layers - 1]
    split = micro_batch.Facts(facts.longest_tokens, fits, facts.lengths_known, facts.noisy)
    return replace(fixed, micro_batch=micro_batch.resolve(requested, most_tokens, split))
