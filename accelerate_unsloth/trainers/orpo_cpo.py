"""
ORPO and CPO on several processes: a mean over pairs plus a mean over the tokens of the chosen answers.

Two means with two counts do not add up over micro-batches by one weight. The weight is the number of pairs; the mean over
tokens is scaled so that it counts by its tokens. With n_m pairs and t_m tokens in a micro-batch, and N and T in the whole
step of all ranks, the factor is (t_m / T) / (n_m / N). N and T take one all-reduce of two numbers per step.
"""

from ..engines import select  # noqa: F401  # Unsloth comes before trl

# isort: split
import warnings

import numpy as np
import torch
from trl.import_utils import TRLExperimentalWarning

with warnings.catch_warnings():  # enable_multi_gpu() imports them for scripts that use neither
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import cpo, orpo

from ..data.lengths import lengths_of
from ..data.prepare import map_once
from ..reduction import sum_over_ranks
from .checks import check_pair_columns
from .mixin import DistributedTrainerMixin
from .preference import PairAdapter
from .reference import engine_bases
from .step import Step

ORPOConfig, CPOConfig = orpo.ORPOConfig, cpo.CPOConfig


class OddsAdapter(PairAdapter):
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
        self._pairs_per_token = None  # of the step
        self._factor, self._nll = 1.0, 0.0  # of the micro-batch

    def items(self, inputs) -> int:
        return len(inputs["chosen_input_ids"])

    def tokens(self, inputs) -> int:
        return int(inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum())

    def lengths(self, dataset) -> np.ndarray | None:
        chosen, rejected = (lengths_of(dataset, f"{name}_input_ids") for name in ("chosen", "rejected"))
        return None if chosen is None or rejected is None else 2 * np.maximum(chosen, rejected)

    def nll_tokens(self, inputs) -> int:
        """Return the tokens that the negative log-likelihood of a micro-batch is the mean over."""
        if self.trainer.nll_over_prompts:
            return int(inputs["chosen_attention_mask"][:, 1:].sum())
        return int(inputs["chosen_labels"][:, 1:].ne(-100).sum())

    def begin_step(self, step: Step) -> None:
        super().begin_step(step)
        counts = [step.items.item(), sum(self.nll_tokens(batch.inputs) for batch in step.micro_batches)]
        totals = torch.tensor(counts, dtype=torch.float64, device=step.items.device)
        pairs, tokens = sum_over_ranks(totals).tolist()
        self._pairs_per_token = pairs / max(1.0, tokens)

    def learn(self, inputs, items: int, step: Step) -> torch.Tensor:
        self._factor = self._pairs_per_token * self.nll_tokens(inputs) / items if self._pairs_per_token else 1.0
        return super().learn(inputs, items, step)

    def end_step(self) -> None:
        super().end_step()
        self._pairs_per_token = None

    def scaled(self, outputs: tuple) -> tuple:
        """Return what `concatenated_forward` returned, with the negative log-likelihood weighed by its tokens."""
        training = self.trainer.model.training
        self._nll = float(outputs[4])
        return (*outputs[:4], outputs[4] * self._factor if training else outputs[4], *outputs[5:])

    def noted(self) -> dict[str, list[float]]:
        notes = self.trainer._stored_metrics["train" if self.trainer.model.training else "eval"]
        plain = {key: key.removeprefix("eval_") for key in notes}
        return {name: notes.pop(key) for key, name in plain.items() if name in self.metrics}

    def metric_items(self, name: str, inputs, items: int) -> int:
        # While training it is scaled already, so that pairs are its weight.
        return self.nll_tokens(inputs) if name == "nll_loss" and not self.trainer.model.training else items

    def evaluation_terms(self, value: float, inputs, items: int) -> list[tuple[float, int]]:
        nll = self.trainer.nll_weight * self._nll
        return [(value - nll, items), (nll, self.nll_tokens(inputs))]


class _OddsMixin(DistributedTrainerMixin):
    adapter_class = OddsAdapter

    def __init__(self, model=None, args=None, *rest, **kwargs):
        check_pair_columns(rest, kwargs)
        with map_once():
            super().__init__(model, args, *rest, **kwargs)

    def concatenated_forward(self, model, batch):
        outputs = super().concatenated_forward(model, batch)
        return outputs if self.adapter is None else self.adapter.scaled(outputs)


class ORPOTrainer(_OddsMixin, *engine_bases(orpo.ORPOTrainer)):
    """
    `trl.experimental.orpo.ORPOTrainer` that gives the same loss curve on one process and on N. TRL may still change it.

    Args:
        args (`Any`), kwargs (`Any`):
            As for TRL's.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples or without `chosen` and `rejected`, or ranks that were set up differently.

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
        ValueError: for data without samples or without `chosen` and `rejected`, or ranks that were set up differently.

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
