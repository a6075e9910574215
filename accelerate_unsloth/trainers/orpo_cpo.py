"""
ORPO and CPO on several processes: a mean over pairs plus a mean over the tokens of the chosen answers.

`TokenMeanAdapter` says how the two means stay exact.
"""

from ..engines import select  # noqa: F401  # Unsloth comes before trl

# isort: split
import warnings

import numpy as np
from trl.import_utils import TRLExperimentalWarning

with warnings.catch_warnings():  # enable_multi_gpu() imports them for scripts that use neither
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import cpo, orpo

from ..data.lengths import lacks_labels, lengths_of
from ..data.prepare import map_once
from .checks import check_pair_columns
from .mixin import DistributedTrainerMixin
from .preference import TokenMeanAdapter
from .reference import engine_bases

ORPOConfig, CPOConfig = orpo.ORPOConfig, cpo.CPOConfig


class OddsAdapter(TokenMeanAdapter):
    """Adapter of TRL's ORPOTrainer and CPOTrainer (trl 1.15.0, experimental)."""

    metrics = (
        *(f"{name}/{kind}" for name in ("rewards", "logps", "logits") for kind in ("chosen", "rejected")),
        "rewards/accuracies",
        "rewards/margins",
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
    )

    def __init__(self, trainer):
        super().__init__(trainer)
        self.check_answers(trainer.max_length)

    def lacks_answer(self, dataset) -> np.ndarray:
        return lacks_labels(dataset, "chosen_labels") | lacks_labels(dataset, "rejected_labels")

    def items(self, inputs) -> int:
        return len(inputs["chosen_input_ids"])

    def tokens(self, inputs) -> int:
        return int(inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum())

    def lengths(self, dataset) -> np.ndarray | None:
        chosen, rejected = (lengths_of(dataset, f"{name}_input_ids") for name in ("chosen", "rejected"))
        return None if chosen is None or rejected is None else 2 * np.maximum(chosen, rejected)

    @property
    def token_weight(self) -> float:
        return self.trainer.nll_weight

    def mean_tokens(self, inputs) -> int:
        if self.trainer.nll_over_prompts:
            return int(inputs["chosen_attention_mask"][:, 1:].sum())
        return int(inputs["chosen_labels"][:, 1:].ne(-100).sum())

    def noted(self) -> dict[str, list[float]]:
        notes = self.trainer._stored_metrics["train" if self.trainer.model.training else "eval"]
        plain = {key: key.removeprefix("eval_") for key in notes}
        return {name: notes.pop(key) for key, name in plain.items() if name in self.metrics}

    def metric_items(self, name: str, inputs, items: int) -> int:
        # While training it is scaled already, so that pairs are its weight.
        return self.mean_tokens(inputs) if name == "nll_loss" and not self.trainer.model.training else items


class _OddsMixin(DistributedTrainerMixin):
    adapter_class = OddsAdapter

    def __init__(self, model=None, args=None, *rest, **kwargs):
        check_pair_columns(rest, kwargs)
        with map_once():
            super().__init__(model, args, *rest, **kwargs)

    def concatenated_forward(self, model, batch):
        outputs = super().concatenated_forward(model, batch)
        return outputs if self.adapter is None else (*outputs[:4], self.adapter.scaled(outputs[4]), *outputs[5:])


class ORPOTrainer(_OddsMixin, *engine_bases(orpo.ORPOTrainer)):
    """
    `trl.experimental.orpo.ORPOTrainer` that gives the same loss curve on one process and on N. TRL may still change it.

    Args:
        args (`Any`), kwargs (`Any`):
            As for TRL's.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples or without `chosen` and `rejected`, prompts that fill `max_length`, or ranks that
            were set up differently.

    Example:

    ```python
    >>> from accelerate_unsloth import ORPOConfig, ORPOTrainer
    >>> trainer = ORPOTrainer(model, ORPOConfig("out"), train_dataset=pairs, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    nll_over_prompts, nll_weight = True, 1.0


class CPOTrainer(_OddsMixin, *engine_bases(cpo.CPOTrainer)):
    """
    `trl.experimental.cpo.CPOTrainer` that gives the same loss curve on one process and on N. TRL may still change it.

    Args:
        args (`Any`), kwargs (`Any`):
            As for TRL's.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples or without `chosen` and `rejected`, prompts that fill `max_length`, or ranks that
            were set up differently.

    Example:

    ```python
    >>> from accelerate_unsloth import CPOConfig, CPOTrainer
    >>> trainer = CPOTrainer(model, CPOConfig("out"), train_dataset=pairs, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    nll_over_prompts = False

    @property
    def nll_weight(self) -> float:
        """What the negative log-likelihood is multiplied by in the loss."""
        return self.cpo_alpha
