"""
DPO and reward models on several processes: losses that are means over pairs of answers.

A pair is two rows, padded to the longer one, so a sample costs twice its longer row. The mean over pairs is additive, so
the effective batch may be split anyhow. Losses that look at several pairs at once are rejected.
"""

from ..engines import select  # noqa: F401  # Unsloth comes before trl

# isort: split
import numpy as np
import trl
from trl import DPOConfig, RewardConfig

from ..data.lengths import lengths_of
from ..launch.topology import topology
from .adapter import SampleAdapter
from .checks import check_pair_columns
from .mixin import DistributedTrainerMixin
from .reference import engine_bases


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


class RewardAdapter(PairAdapter):
    """Adapter of TRL's RewardTrainer."""

    metrics = ("mean_reward", "accuracy", "margin")
    extremes = {"min_reward": "min", "max_reward": "max"}


class DPOAdapter(PairAdapter):
    """Adapter of TRL's DPOTrainer."""

    metrics = (
        "entropy",
        "mean_token_accuracy",
        *(f"{name}/{kind}" for name in ("rewards", "logps", "logits") for kind in ("chosen", "rejected")),
        "rewards/accuracies",
        "rewards/margins",
    )

    # Losses that do not add up over pairs (trl 1.15.0, `DPOTrainer._compute_loss`).
    _COUPLED = {"aot": "sorts the pairs of a micro-batch", "aot_unpaired": "sorts the pairs of a micro-batch"}
    _COUPLED |= {"sft": "is a mean over the tokens of a micro-batch"}

    def __init__(self, trainer):
        super().__init__(trainer)
        for loss_type in trainer.args.loss_type:
            if loss_type in self._COUPLED:
                raise ValueError(
                    f"loss_type={loss_type!r} {self._COUPLED[loss_type]}, so the loss would depend on how a step is split. Use "
                    "another loss_type, or trl's own trainer on one process."
                )


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
