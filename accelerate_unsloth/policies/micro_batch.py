"""
How an effective batch is cut into micro-batches.

The effective batch is the user's; the cut changes neither samples nor loss. `auto` forms as few micro-batches as the
memory allows, because each costs its kernel launches; `fixed` keeps the cut of the user's arguments.
"""

from dataclasses import dataclass

# The probe tries so much more than the largest micro-batch planned for this epoch: later epochs deal other samples together.
PROBE_MARGIN = 1.25

# After an out-of-memory, planned or probed, the next budget is this part of what did not fit.
BACK_OFF = 0.7


@dataclass(frozen=True)
class MicroBatchChoice:
    mode: str  # "fixed" | "auto"
    token_budget: int | None  # most tokens of a micro-batch, under "auto"
    reason: str  # one clause, shown in the start-up table


def resolve(
    requested: str,
    lengths_known: bool,
    in_step: bool,
    most_tokens: int | None,
    fits: int | None,
    longest: int,
    noisy: bool = False,
) -> MicroBatchChoice:
    """
    Choose the cut.

    Args:
        requested (`str`): `"auto"` or `"fixed"`.
        lengths_known (`bool`): Whether the length of each sample is known.
        in_step (`bool`): Whether ranks meet in every micro-step, and so need as many micro-batches each.
        most_tokens (`int`, *optional*): Largest micro-batch that the user allows, in tokens.
        fits (`int`, *optional*): Largest one that fits the smallest memory of all ranks; `None` if not known.
        longest (`int`): Tokens of the longest sample.
        noisy (`bool`, *optional*, defaults to `False`): Whether NEFTune adds noise, which is weaker in longer micro-batches.

    Raises:
        ValueError: if the longest sample is above what the user allows.

    Example:

    ```python
    >>> from accelerate_unsloth.policies import micro_batch
    >>> micro_batch.resolve("auto", True, False, None, fits=30_000, longest=2048).token_budget
    30000
    ```
    """
    if why := why_fixed(requested, lengths_known, in_step, noisy):
        return MicroBatchChoice("fixed", None, why)
    if most_tokens is not None and longest > most_tokens:
        raise ValueError(
            f"micro_batch_tokens={most_tokens}, but the longest sample has {longest} tokens. Give at least that many, or "
            "lower max_length."
        )
    if fits is None and most_tokens is None:
        return MicroBatchChoice(
            "fixed", None, "what fits is known neither on a CPU nor for layers that were not measured"
        )
    budgets = [budget for budget in (most_tokens, fits) if budget is not None]
    # What does not fit alone is tried nevertheless: the arithmetic may be wrong, the probe is not.
    budget = max(min(budgets), longest)
    reason = "asked for" if budget == most_tokens else "what the memory holds"
    return MicroBatchChoice("auto", budget, f"at most {budget:,} tokens each: {reason}")


def why_fixed(requested: str, lengths_known: bool, in_step: bool, noisy: bool = False) -> str | None:
    """Why the cut stays that of the user's arguments, whatever the memory holds; `None` where it follows the memory."""
    if requested == "fixed":
        return "asked for"
    if not lengths_known:
        return "the lengths of the samples are not known"
    if in_step:
        return "overlapped ranks meet in every micro-step"
    return "the strength of NEFTune's noise depends on the micro-batch" if noisy else None


def confirmed(choice: MicroBatchChoice, tokens: int, longest: int) -> MicroBatchChoice:
    """The choice after a micro-batch of so many tokens fitted on every rank: nothing larger is formed."""
    budget = max(longest, min(choice.token_budget, tokens))
    return MicroBatchChoice(choice.mode, budget, f"at most {budget:,} tokens each, which were tried before training")


def lowered(choice: MicroBatchChoice, tokens_that_failed: int, longest: int, why: str) -> MicroBatchChoice:
    """The choice after a micro-batch of so many tokens ran out of memory."""
    budget = max(longest, int(min(choice.token_budget, tokens_that_failed) * BACK_OFF))
    return MicroBatchChoice(choice.mode, budget, f"at most {budget:,} tokens each: {why}")
