"""
How an effective batch is split into micro-batches.

The effective batch is the user's; the split changes neither samples nor loss. `auto` forms as few micro-batches as the
memory allows, because each costs its kernel launches. `fixed` keeps the split of the training arguments.
"""

from dataclasses import dataclass

# The probe tries this much more than the largest micro-batch of this epoch: later epochs combine other samples.
PROBE_MARGIN = 1.25

# After an out-of-memory error, in the probe or a step, the next budget is this part of what did not fit.
BACK_OFF = 0.7


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    longest_tokens: int  # of a sample
    fits_tokens: int | None = None  # largest micro-batch that fits the smallest memory of all ranks; None if not known
    lengths_known: bool = True  # of each sample
    noisy: bool = False  # whether NEFTune adds noise, which is weaker in longer micro-batches


@dataclass(frozen=True)
class MicroBatchChoice:
    mode: str  # "fixed" | "auto"
    token_budget: int | None  # most tokens of a micro-batch, under "auto"
    reason: str  # one clause, shown in the start-up table

    def confirmed(self, tokens: int, longest_tokens: int) -> "MicroBatchChoice":
        """Return the choice after a micro-batch of so many tokens fitted on every rank: nothing larger is formed."""
        budget = max(longest_tokens, min(self.token_budget, tokens))
        return MicroBatchChoice(self.mode, budget, f"at most {budget:,} tokens each, which were tried before training")

    def lowered(self, tokens_that_failed: int, longest_tokens: int, why: str) -> "MicroBatchChoice":
        """Return the choice after a micro-batch of so many tokens ran out of memory."""
        budget = max(longest_tokens, int(min(self.token_budget, tokens_that_failed) * BACK_OFF))
        return MicroBatchChoice(self.mode, budget, f"at most {budget:,} tokens each: {why}")


def resolve(requested: str, most_tokens: int | None, facts: Facts) -> MicroBatchChoice:
    """
    Choose the split; `requested` and `most_tokens` are the plugin's options.

    Raises:
        ValueError: if the longest sample is above what the user allows.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import micro_batch
    >>> micro_batch.resolve("auto", None, micro_batch.Facts(longest_tokens=2048, fits_tokens=30_000)).token_budget
    30000
    ```
    """
    if why := why_fixed(requested, facts.lengths_known, facts.noisy):
        return MicroBatchChoice("fixed", None, why)
    if most_tokens is not None and facts.longest_tokens > most_tokens:
        raise ValueError(
            f"micro_batch_tokens={most_tokens}, but the longest sample has {facts.longest_tokens} tokens. Allow at least "
            "that many, or lower max_length."
        )
    budgets = [budget for budget in (most_tokens, facts.fits_tokens) if budget is not None]
    if not budgets:
        why = "what fits is known neither on a CPU nor for layers that were not measured"
        return MicroBatchChoice("fixed", None, why)
    # A sample that does not fit by arithmetic is tried nevertheless: the probe decides.
    budget = max(min(budgets), facts.longest_tokens)
    reason = "asked for" if budget == most_tokens else "what the memory holds"
    return MicroBatchChoice("auto", budget, f"at most {budget:,} tokens each: {reason}")


def why_fixed(requested: str, lengths_known: bool, noisy: bool = False) -> str | None:
    """Return why the split stays that of the training arguments; `None` where it follows the memory."""
    if requested == "fixed":
        return "asked for"
    if not lengths_known:
        return "the lengths of the samples are not known"
    return "the strength of NEFTune's noise depends on the micro-batch" if noisy else None
