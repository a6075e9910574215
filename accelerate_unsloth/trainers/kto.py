"""
KTO on several processes: a mean over answers, with an estimate of the KL divergence of the whole step inside.

TRL estimates it in each micro-batch, from answers that are rotated within the per-device batch, so the loss depends on how a
step is split. Here answers are rotated within the effective batch. Each rank runs the passes of its own micro-batches before
the step, which have no gradients and would run anyway, and one all-reduce of two numbers gives the estimate of the step.
"""

from ..engines import select  # noqa: F401  # Unsloth comes before trl

# isort: split
import numpy as np
import torch
import trl
from trl import KTOConfig
from trl.trainer.utils import use_adapter

from ..data.lengths import lengths_of
from ..patches import patched
from ..reduction import sum_over_ranks
from .adapter import SampleAdapter
from .loss import MetricBook
from .mixin import DistributedTrainerMixin
from .reference import engine_bases
from .step import Step

_OF_CHOSEN = ("rewards/chosen", "logps/chosen", "logits/chosen")
_OF_REJECTED = ("rewards/rejected", "logps/rejected", "logits/rejected")


class KTOAdapter(SampleAdapter):
    """Adapter of TRL's KTOTrainer, whose loss is a mean over answers."""

    unit = "answers"
    metrics = ("kl", "entropy", *_OF_CHOSEN, *_OF_REJECTED)
    kl: float | None = None  # of the step

    def items(self, inputs) -> int:
        return len(inputs["label"])

    def lengths(self, dataset) -> np.ndarray | None:
        names = ("prompt_ids", "completion_ids", "KL_completion_ids")
        prompts, answers, rotated = (lengths_of(dataset, name) for name in names)
        if prompts is None or answers is None:
            return None
        longest = self.trainer.args.max_length or np.iinfo(np.int32).max
        rows = np.minimum(prompts + answers, longest)
        return rows if rotated is None else rows + np.minimum(prompts + rotated, longest)

    def begin_step(self, step: Step) -> None:
        super().begin_step(step)
        if not self.trainer.calculate_KL:
            return
        totals = torch.zeros(2, dtype=torch.float64, device=step.items.device)
        self.trainer.model.train()
        for batch in step.micro_batches:
            divergence = self.trainer.divergence(self.trainer._prepare_inputs(dict(batch.inputs)))
            totals += torch.stack([divergence.double().sum(), totals.new_tensor(len(divergence))])
        divergences, rows = sum_over_ranks(totals)
        self.kl = float(divergences / rows.clamp(min=1.0))

    def end_step(self) -> None:
        super().end_step()
        self.kl = None

    def metric_items(self, name: str, inputs, items: int) -> int:
        chosen = int(inputs["label"].sum())
        return chosen if name in _OF_CHOSEN else items - chosen if name in _OF_REJECTED else items

    def noted(self) -> dict[str, list[float]]:
        notes = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        notes.pop("rewards/margins", None)  # a difference of means, which is no mean
        return super().noted()

    def read(self, book: MetricBook) -> dict[str, float]:
        metrics = super().read(book)
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


class KTOTrainer(DistributedTrainerMixin, *engine_bases(trl.KTOTrainer)):
    """
    `trl.KTOTrainer` that gives the same loss curve on one process and on N.

    Args:
        args (`Any`), kwargs (`Any`):
            As for `trl.KTOTrainer`. The KL divergence is estimated over the effective batch, which has to be larger than 1.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples, an effective batch of 1, or ranks that were set up differently.

    Example:

    ```python
    >>> from accelerate_unsloth import KTOConfig, KTOTrainer
    >>> args = KTOConfig("out", train_sampling_strategy="sequential")
    >>> trainer = KTOTrainer(model, args=args, train_dataset=answers, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    adapter_class = KTOAdapter

    def __init__(self, model=None, ref_model=None, args=None, *rest, **kwargs):
        self._per_device = None
        if args is not None:  # TRL rotates answers within it, and rejects 1
            self._per_device = args.per_device_train_batch_size
            args.per_device_train_batch_size *= args.gradient_accumulation_steps * args.world_size
        super().__init__(model, ref_model, args, *rest, **kwargs)

    def create_accelerator_and_postprocess(self):
        """Set up the accelerator as the Trainer does; by then the data is prepared, and the user's batch size comes back."""
        if self._per_device is not None:
            self.args.per_device_train_batch_size = self._per_device
        super().create_accelerator_and_postprocess()

    @torch.no_grad()
    def divergence(self, inputs) -> torch.Tensor:
        """Return policy minus reference log-probabilities of the rotated answers, of shape `(rows,)`."""
        compute = super()._compute_kl_logps
        with self.compute_loss_context_manager():
            policy = compute(self.model_wrapped, inputs)
            if self.precompute_ref_logps:
                return policy - inputs["ref_KL_logps"]
            if self.ref_model is not None:
                return policy - compute(self.ref_model, inputs)
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                return policy - compute(self.model, inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        kl = None if self.adapter is None else self.adapter.kl
        if kl is None or not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        # The loss takes the difference of policy and reference, in this order.
        reference = inputs["ref_KL_logps"] if self.precompute_ref_logps else torch.zeros(len(inputs["label"]))
        reference = reference.to(self.args.device)
        answers = iter([reference + kl, reference])
        with patched(self, _compute_kl_logps=lambda model, batch: next(answers)):
            return super()._compute_loss(model, inputs, return_outputs)


__all__ = ["KTOConfig", "KTOTrainer"]
