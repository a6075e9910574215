"""
What the step has to know of a trainer's loss: how much a micro-batch weighs, what a sample costs, and how to run it.

The base class is that of losses over labelled tokens, TRL's SFT. A trainer with another loss overrides what differs: for
pairs, `unit`, `choice`, `items`, `lengths`, `length` and `metrics`. The loss runs on one rank alone: whatever it gathers returns its argument, because
ranks have different numbers of micro-batches.
"""

import functools
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch

from ..data.lengths import lengths_of
from ..data.loader import MicroBatch, count_items, count_tokens
from ..launch.channel import channel
from ..patches import patched
from ..policies import loss as loss_policy
from . import log_probs, loss
from .router_balance import RouterBalance
from .step import Step

log_probs.install()


class LossAdapter:
    """
    Adapter of a trainer whose loss is a mean over labelled tokens.

    Args:
        trainer ([`~transformers.Trainer`]): With its model.

    Attributes:
        unit (`str`): What the loss is a mean over, for the start-up table.
        metrics (`tuple[str]`), extremes (`dict[str, str]`): What TRL's losses note for each micro-batch; see [`MetricBook`].
        choice (`LossChoice`): How the loss uses the item count; `None` for a custom one until it was tried.
        balance ([`RouterBalance`]): Of a mixture of experts that trains its balancing loss, else `None`.
        book ([`MetricBook`]): What the losses noted since the last log.
    """

    unit = "tokens"
    metrics = ("entropy", "mean_token_accuracy", "aux_loss")  # Unsloth's loss leaves them out (unsloth 2026.10.9)
    extremes: ClassVar[dict[str, str]] = {}

    def __init__(self, trainer):
        self.trainer = trainer
        self.balance = RouterBalance(trainer.model.config) if getattr(trainer, "aux_loss_enabled", False) else None
        self.choice = None if loss.is_custom(trainer) else loss_policy.own(trainer.model_accepts_loss_kwargs)
        self.book = loss.MetricBook(self.metrics, self.extremes)

    # ---- What a micro-batch weighs, and what a sample costs ----

    def items(self, inputs: dict[str, Any]) -> int:
        """Return the positions of a collated micro-batch whose loss counts, as this model's loss sees them."""
        return count_items(inputs, getattr(self.trainer, "_loss_shifts_labels", True))

    def tokens(self, inputs: dict[str, Any]) -> int:
        """Return the tokens of a collated micro-batch, without padding."""
        return count_tokens(inputs)

    def lengths(self, dataset) -> np.ndarray | None:
        """Return the tokens of each sample, of shape `(num_samples,)`; `None` where they are not known."""
        return lengths_of(dataset)

    @property
    def padded(self) -> bool:
        """Whether rows of a micro-batch are padded to its longest."""
        owners = (self.trainer, self.trainer.args, getattr(self.trainer, "data_collator", None))
        return not any(getattr(owner, "padding_free", False) for owner in owners)

    def length(self, sample: int) -> int:
        """Return the tokens of one sample of the training data, for messages."""
        return len(self.trainer.train_dataset[sample].get("input_ids", ()))

    # ---- Running it ----

    def collate(self, samples: Sequence[int]) -> dict[str, Any]:
        """Return the collated micro-batch of samples of the training data."""
        loader = self.trainer.callback_handler.train_dataloader
        return loader.collate_fn([loader.dataset[index] for index in samples])

    def learn(self, inputs: dict[str, Any], items: int, step: Step) -> torch.Tensor:
        """Run forward and backward of a collated micro-batch; return its loss, divided by the items of the step."""
        trainer, count, weight, divisor = self.trainer, self.trainer.step_item_count, None, step.items
        if count is None or (self.choice is not None and not self.choice.divides):
            count, weight, divisor = None, items / step.items, items  # the loss is a mean over the micro-batch
        balance = nullcontext() if self.balance is None else self.balance.weighing(divisor)
        accumulation, trainer.current_gradient_accumulation_steps = trainer.current_gradient_accumulation_steps, 1
        try:
            with self.alone(inputs, items, weight), balance:
                return trainer.stock_training_step(inputs, count)
        finally:
            trainer.current_gradient_accumulation_steps = accumulation

    @contextmanager
    def alone(self, inputs: dict[str, Any], items: int, weight: torch.Tensor | None = None):
        """Compute losses on this rank alone, multiplied by `weight`, with their metrics in our book if that succeeds."""
        trainer, own = self.trainer, self.trainer.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            if self.balance is not None:  # models with a vision tower take it as an argument only
                inputs = {**inputs, "output_router_logits": True}
            result = own(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            if weight is None:
                return result
            value, *outputs = result if return_outputs else (result,)
            value = value * weight.to(value.dtype)
            return (value, *outputs) if return_outputs else value

        # On the instance, because a subclass may override the method without a call of `super()`.
        with loss.without_collectives(trainer.accelerator), patched(trainer, compute_loss=compute_loss):
            try:
                yield
            except BaseException:
                self.noted()  # what it had noted is left out
                raise
        self.book.take(self.noted(), {name: self.metric_items(name, inputs, items) for name in self.metrics})

    def noted(self) -> dict[str, list[float]]:
        """Take what the losses have noted by the names of our metrics; others stay, to be logged as TRL does."""
        notes = getattr(self.trainer, "_metrics", {}).get("train" if self.trainer.model.training else "eval", {})
        notes.pop("num_tokens", None)  # ours is of all ranks
        return {name: notes.pop(name) for name in (*self.metrics, *self.extremes) if name in notes}

    def metric_items(self, name: str, inputs: dict[str, Any], items: int) -> int:
        """Return how many items of a micro-batch a metric is the mean of."""
        return items

    def evaluation_terms(self, value: float, inputs: dict[str, Any], items: int) -> list[tuple[float, int]]:
        """Return the means that an evaluation loss is the sum of, each with the number of items behind it."""
        return [(value, items)]

    # ---- Around training and steps ----

    def begin_training(self, first_samples: list[int]) -> None:
        """Try a custom loss on this rank's first sample, if it has any, and forget what the probe noted."""
        batches = []
        if self.choice is None and first_samples:
            with torch.random.fork_rng([]):  # a collator may draw
                inputs = self.collate(first_samples[:1])
            batches = [MicroBatch(inputs, self.items(inputs), [])]
        self.try_custom_loss(batches)
        for noted in getattr(self.trainer, "_metrics", {}).values():
            noted.clear()
        self.book = self.book.empty()

    def begin_step(self, step: Step) -> None:
        """Do what needs all micro-batches of a step; all ranks come here together."""
        self.try_custom_loss(step.micro_batches)
        if self.balance is not None:
            self._count_routes([batch for batch in step.micro_batches if batch.items], step)

    def end_step(self) -> None:
        """Forget what belongs to the step."""
        if self.balance is not None:
            self.balance.end_step()

    def try_custom_loss(self, batches: list[MicroBatch]) -> None:
        """Find out how a custom loss uses the item count, unless it is known; all ranks come here together."""
        if self.choice is not None:
            return
        batch = next((batch for batch in batches if batch.items), None)
        ratio = None if batch is None else loss.count_ratio(self.trainer, self.balance, batch.inputs, batch.items)
        ratios = channel().gather("custom loss", ratio)
        if any(ratio is not None for ratio in ratios):
            self.choice = loss_policy.resolve(ratios)

    def _count_routes(self, batches: list[MicroBatch], step: Step) -> None:
        """Let the balancing loss of a mixture of experts be that of the whole step."""
        trainer, device = self.trainer, self.trainer.args.device

        def forward(inputs):
            with trainer.compute_loss_context_manager():
                unlabelled = {name: value for name, value in inputs.items() if "labels" not in name}
                options = {"output_router_logits": True, "use_cache": False, "logits_to_keep": 1}
                trainer.model_wrapped(**trainer._prepare_inputs(unlabelled), **options)

        trainer.model.train()
        # The same dropout as in the forwards with gradients, which draw in the same order.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.balance.count((functools.partial(forward, batch.inputs) for batch in batches), step.items)

    def read(self, book: loss.MetricBook) -> dict[str, float]:
        """Return the metrics of all ranks in a book, which is empty then; all ranks come here together."""
        return book.read(self.trainer.args.device)

    def logs(self) -> dict[str, float]:
        """Return what the losses of all ranks noted since the last log; all ranks come here together."""
        means = self.read(self.book)
        if self.balance is not None and self.balance.values:
            values, self.balance.values = self.balance.values, []
            means["aux_loss"] = sum(values) / len(values)
        return means


class SampleAdapter(LossAdapter):
    """Adapter of a trainer whose loss is a mean over samples, in rows that are padded."""

    padded = True

    def __init__(self, trainer):
        super().__init__(trainer)
        self.choice = loss_policy.LossChoice(False, "of all ranks and micro-batches")
        if self.balance is not None:
            raise ValueError(
                "The load-balancing loss of the experts does not add up over micro-batches in this trainer. Set "
                "router_aux_loss_coef=0.0."
            )

    def length(self, sample: int) -> int:
        return int(self.trainer._train_lengths[sample]) if self.trainer._train_lengths is not None else 0
