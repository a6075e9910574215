"""The losses of a step's micro-batches: custom ones, those of mixtures of experts, and what they note as metrics."""

import functools
from contextlib import contextmanager

from ..engines.loaded import choice

# isort: split
import torch

from ..data.loader import MicroBatch
from ..launch.channel import channel
from ..policies import loss as loss_policy
from . import log_probs, loss
from .router_balance import RouterBalance

log_probs.install()

# What TRL's losses note for each micro-batch, and Unsloth's leave out (trl 1.15.0, unsloth 2026.10.9).
METRICS = ("entropy", "mean_token_accuracy", "aux_loss")


class LossMixin:
    """How losses are computed and weighed, for [`DistributedTrainerMixin`]."""

    def __init__(self, *args, **kwargs):
        self._metric_book = loss.MetricBook(METRICS)
        super().__init__(*args, **kwargs)
        self._check_metric()
        self._balance = RouterBalance(self.model.config) if getattr(self, "aux_loss_enabled", False) else None
        # A custom one is tried on the first micro-batch.
        self.loss = None if loss.is_custom(self) else loss_policy.own(self.model_accepts_loss_kwargs)

    def _check_metric(self) -> None:
        """Reject a best metric that no evaluation will log, which the Trainer finds out after the first one."""
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        missing = choice.name == "unsloth" and self.compute_metrics is None and metric in METRICS
        if missing and self.args.eval_strategy != "no":
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is not logged with Unsloth, whose loss builds no "
                "logits. Use 'eval_loss', or compute the metric in compute_metrics."
            )

    def _first_sample(self) -> list[MicroBatch]:
        """Return this rank's first sample of the epoch, if a custom loss is to be tried on it."""
        sampler = self._planned_sampler()
        planned = sampler.plan(0)[sampler.rank] if self.loss is None else []
        with torch.random.fork_rng([]):  # a collator may draw
            batches = [self._collate(samples[:1]) for samples in planned[:1]]
        return [MicroBatch(inputs, self._count_items(inputs), []) for inputs in batches]

    def _try_custom_loss(self, batches: list[MicroBatch]) -> None:
        """Find out how a custom loss uses the item count, unless it is known; all ranks come here together."""
        if self.loss is not None:
            return
        batch = next((batch for batch in batches if batch.items), None)
        ratio = None if batch is None else loss.count_ratio(self, batch.inputs, batch.items)
        ratios = channel().gather("custom loss", ratio)
        if any(ratio is not None for ratio in ratios):
            self.loss = loss_policy.resolve(ratios)

    def _count_routes(self, batches: list[MicroBatch]) -> None:
        """Let a mixture of experts' balancing loss be that of the whole step."""
        if self._balance is None:
            return

        def forward(inputs):
            with self.compute_loss_context_manager():
                unlabelled = {name: value for name, value in inputs.items() if "labels" not in name}
                options = {"output_router_logits": True, "use_cache": False, "logits_to_keep": 1}
                self.model_wrapped(**self._prepare_inputs(unlabelled), **options)

        self.model.train()
        device = self.args.device
        # The same dropout as in the forwards with gradients, which draw in the same order.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._balance.count((functools.partial(forward, batch.inputs) for batch in batches), self._step_items)

    @contextmanager
    def _alone(self, items: int, weight=None):
        """Compute losses on this rank alone, multiplied by `weight`, with their metrics in our book."""
        own = self.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            if self._balance is not None:  # models with a vision tower take it as an argument only
                inputs = {**inputs, "output_router_logits": True}
            noted = getattr(self, "_metrics", {}).get("train" if self.model.training else "eval", {})
            result = own(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            noted.pop("num_tokens", None)  # ours is of all ranks
            self._metric_book.take(noted, items)
            if weight is None:
                return result
            value, *outputs = result if return_outputs else (result,)
            value = value * weight.to(value.dtype)
            return (value, *outputs) if return_outputs else value

        with loss.without_collectives(self.accelerator), loss.replaced(self, compute_loss):
            yield
