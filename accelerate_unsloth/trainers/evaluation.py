"""Evaluation: the exact mean loss over all tokens of all ranks, and TRL's metrics likewise."""

import torch

from ..data.loader import PlannedDataLoader
from ..launch.channel import channel
from . import loss
from .losses import METRICS


class EvaluationMixin:
    """Evaluation, for [`DistributedTrainerMixin`]."""

    _eval_sums = None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The stock loop; without custom metrics the loss is the exact mean over all tokens of all ranks."""
        exact = isinstance(dataloader, PlannedDataLoader)
        self._eval_sums = [0.0, 0] if exact else None
        self._eval_batches_left = dataloader.batch_sampler.num_real if exact else None
        training_book, self._metric_book = self._metric_book, loss.MetricBook(METRICS)
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            book, self._metric_book = self._metric_book, training_book
            sums, self._eval_sums = self._eval_sums, None
        metrics = book.means(self.args.device)
        if exact:
            losses, items = zip(*channel().gather("evaluation", sums), strict=True)
            output.metrics[f"{metric_key_prefix}_loss"] = sum(losses) / sum(items) if any(items) else float("nan")
        for name, value in metrics.items():  # one of the user's own by that name stays
            output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        items = self._count_items(inputs)
        if self._eval_sums is not None:
            self._eval_batches_left -= 1
            if not items or self._eval_batches_left < 0:
                return torch.zeros((), device=self.args.device), None, None
        with self._alone(items):
            value, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if self._eval_sums is not None:
            self._eval_sums[0] += value.item() * items
            self._eval_sums[1] += items
        return value, logits, labels
