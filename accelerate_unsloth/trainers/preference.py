"""
DPO and reward models on several processes: losses that are means over pairs of answers.

A pair is two rows, padded to the longer one, so a sample costs twice its longer row. The mean over pairs is additive, so
the effective batch may be split anyhow. A mean over tokens beside it is scaled. Losses that look at several pairs at once
are rejected.
"""

from ..engines import select  # noqa: F401  # Unsloth comes before trl

# isort: split
import datasets
import numpy as np
import torch
import trl
from trl import DPOConfig, RewardConfig

from ..data.lengths import lengths_of
from ..launch.topology import topology
from ..reduction import sum_over_ranks
from .adapter import SampleAdapter
from .checks import check_answers_left, check_pair_columns
from .mixin import DistributedTrainerMixin
from .reference import engine_bases
from .step import Step


class PairAdapter(SampleAdapter):
    """Adapter of a trainer whose loss is a mean over pairs, which its collator lays out as all chosen, then all rejected."""

    unit = "pairs"

    def items(self, inputs) -> int:
        return len(inputs["input_ids"]) // 2

    def lengths(self, dataset) -> np.ndarray | None:
        prompts, chosen, rejected = (lengths_of(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
        if chosen is None or rejected is None:
            return None
        rows = np.maximum(chosen, rejected) + (0 if prompts is None else prompts)
        longest = self.trainer.args.max_length
        return 2 * (rows if longest is None else np.minimum(rows, longest))


class TokenMeanAdapter(PairAdapter):
    """
    Adapter of a trainer whose loss adds a mean over tokens to the mean over pairs.

    Two means with two counts do not add up over micro-batches by one weight. The weight is the number of pairs; the mean
    over tokens is scaled so that it counts by its tokens. With n_m pairs and t_m tokens in a micro-batch, and N and T in the
    whole step of all ranks, the factor is (t_m / T) / (n_m / N). N and T take one all-reduce of two numbers per step.

    Attributes:
        token_weight (`float`): What the mean over tokens is multiplied by in the loss; 0 where it is left out.
    """

    token_weight = 0.0

    def __init__(self, trainer):
        super().__init__(trainer)
        self._pairs_per_token = None  # of the step
        self._factor, self._token_mean = 1.0, 0.0  # of the micro-batch

    def mean_tokens(self, inputs) -> int:
        """Return the tokens that the mean over tokens of a micro-batch is over."""
        raise NotImplementedError

    def lacks_answer(self, dataset) -> np.ndarray:
        """Return for each sample whether truncation leaves no token of an answer, as bool."""
        raise NotImplementedError

    def check_answers(self, max_length: int | None) -> None:
        """Reject samples without a token of an answer, of which TRL's mean is not a number."""
        for split, dataset in (("training", self.trainer.train_dataset), ("evaluation", self.trainer.eval_dataset)):
            for rows in dataset.values() if isinstance(dataset, dict) else [dataset]:
                if isinstance(rows, datasets.Dataset):
                    check_answers_left(self.lacks_answer(rows), split, max_length)

    def begin_step(self, step: Step) -> None:
        super().begin_step(step)
        if not self.token_weight:
            return
        counts = [step.items.item(), sum(self.mean_tokens(batch.inputs) for batch in step.micro_batches)]
        totals = torch.tensor(counts, dtype=torch.float64, device=step.items.device)
        pairs, tokens = sum_over_ranks(totals).tolist()
        self._pairs_per_token = pairs / max(1.0, tokens)

    def learn(self, inputs, items: int, step: Step) -> torch.Tensor:
        self._factor = self._pairs_per_token * self.mean_tokens(inputs) / items if self._pairs_per_token else 1.0
        return super().learn(inputs, items, step)

    def end_step(self) -> None:
        super().end_step()
        self._pairs_per_token = None

    def scaled(self, token_mean: torch.Tensor) -> torch.Tensor:
        """Return the mean over the tokens of a micro-batch, weighed by its tokens while training."""
        if self.trainer.model.training:
            return token_mean * self._factor
        self._token_mean = float(token_mean)
        return token_mean

    def evaluation_terms(self, value: float, inputs, items: int) -> list[tuple[float, int]]:
        if not self.token_weight:
            return super().evaluation_terms(value, inputs, items)
        token_mean = self.token_weight * self._token_mean
        return [(value - token_mean, items), (token_mean, self.mean_tokens(inputs))]


class RewardAdapter(PairAdapter):
    """Adapter of TRL's RewardTrainer."""

    metrics = ("mean_reward", "accuracy", "margin")
    extremes = {"min_reward": "min", "max_reward": "max"}


class _SftWeight:
    """Weight of the loss "sft" in TRL's sum of losses, which multiplies its mean over tokens by it."""

    def __init__(self, adapter: "DPOAdapter", weight: float):
        self._adapter, self._weight = adapter, weight

    def __rmul__(self, token_mean: torch.Tensor) -> torch.Tensor:
        return self._adapter.scaled(token_mean) * self._weight


class DPOAdapter(TokenMeanAdapter):
    """Adapter of TRL's DPOTrainer. Its loss "sft" is a mean over the tokens of the chosen answers."""

    metrics = (
        "entropy",
        "mean_token_accuracy",
        *(f"{name}/{kind}" for name in ("rewards", "logps", "logits") for kind in ("chosen", "rejected")),
        "rewards/accuracies",
        "rewards/margins",
    )

    # Losses that do not add up over pairs (trl 1.15.0, `DPOTrainer._compute_loss`).
    _COUPLED = ("aot", "aot_unpaired")

    def __init__(self, trainer):
        super().__init__(trainer)
        for loss_type in trainer.loss_types:
            if loss_type in self._COUPLED:
                raise ValueError(
                    f"loss_type={loss_type!r} sorts the pairs of a micro-batch, so the loss would depend on how a step is "
                    "split. Use another loss_type, or trl's own trainer on one process."
                )
        weights = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
        self.token_weight = sum(weight for loss_type, weight in weights if loss_type == "sft")
        if self.token_weight:
            if trainer.use_weighting:
                raise ValueError(
                    "use_weighting=True multiplies the loss 'sft', which is a mean over tokens, by weights of pairs, so the "
                    "loss would depend on how a step is split. Leave out one of the two."
                )
            self.check_answers(trainer.args.max_length)
            # Read by `_compute_loss` only; the arguments stay as they are.
            trainer.loss_weights = [_SftWeight(self, weight) if kind == "sft" else weight for kind, weight in weights]

    def mean_tokens(self, inputs) -> int:
        return int(inputs["completion_mask"][: self.items(inputs), 1:].sum())

    def lacks_answer(self, dataset) -> np.ndarray:
        # TRL leaves out prompts that fill max_length.
        prompts, chosen = lengths_of(dataset, "prompt_ids"), lengths_of(dataset, "chosen_ids")
        if prompts is None or chosen is None:  # images, which the collator prepares
            return np.zeros(len(dataset), bool)
        return chosen + np.minimum(prompts, 1) < 2  # the first token is no target


class DPOTrainer(DistributedTrainerMixin, *engine_bases(trl.DPOTrainer)):
    """
    `trl.DPOTrainer` that gives the same loss curve on one process and on N.

    Args:
        args (`Any`), kwargs (`Any`):
            As for `trl.DPOTrainer`.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples or without `chosen` and `rejected`, a loss that couples pairs, or ranks that
            were set up differently.

    Example:

    ```python
    >>> from accelerate_unsloth import DPOConfig, DPOTrainer, FastLanguageModel
    >>> model, tokenizer = FastLanguageModel.from_pretrained("path/to/model", max_seq_length=2048)
    >>> model = FastLanguageModel.get_peft_model(model, r=16)
    >>> trainer = DPOTrainer(model, args=DPOConfig("out"), train_dataset=pairs, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    adapter_class = DPOAdapter

    def __init__(self, model=None, ref_model=None, args=None, *rest, **kwargs):
        check_pair_columns(rest, kwargs)
        place = topology()
        if getattr(args, "precompute_ref_log_probs", False) and place.local_world_size < place.world_size:
            raise ValueError(
                "precompute_ref_log_probs=True writes a file on rank 0 that the other machines do not see (trl 1.15.0, "
                "`_precompute_ref_logps`). Leave it out: the reference is then run with each micro-batch."
            )
        super().__init__(model, ref_model, args, *rest, **kwargs)


class RewardTrainer(DistributedTrainerMixin, *engine_bases(trl.RewardTrainer)):
    """
    `trl.RewardTrainer` that gives the same loss curve on one process and on N.

    Args:
        args (`Any`), kwargs (`Any`):
            As for `trl.RewardTrainer`.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples or without `chosen` and `rejected`, or ranks that were set up differently.

    Example:

    ```python
    >>> from accelerate_unsloth import RewardConfig, RewardTrainer
    >>> trainer = RewardTrainer(model, RewardConfig("out"), train_dataset=pairs, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    adapter_class = RewardAdapter

    def __init__(self, model=None, args=None, *rest, **kwargs):
        check_pair_columns(rest, kwargs)
        super().__init__(model, args, *rest, **kwargs)


__all__ = ["DPOConfig", "DPOTrainer", "RewardConfig", "RewardTrainer"]
