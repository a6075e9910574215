"""Evaluation: the exact mean loss over all items of all ranks, and TRL's metrics likewise."""

from contextlib import nullcontext

import torch

from ..data.loader import PlannedDataLoader
from ..launch.channel import channel
from ..patches import patched


class EvaluationMixin:
    """Evaluation, for [`DistributedTrainerMixin`]."""

    _eval_sums = None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Run the stock loop; without custom metrics the loss is the exact mean over all items of all ranks."""
        exact = isinstance(dataloader, PlannedDataLoader)
        self._eval_sums = [] if exact else None
        training_book, self.adapter.book = self.adapter.book, self.adapter.book.empty()
        # Ranks may have different numbers of batches, and the loop gathers the loss of each.
        alone = patched(self, gather_function=lambda value: value) if exact else nullcontext()
        try:
            with alone:
                output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            book, self.adapter.book = self.adapter.book, training_book
            sums, self._eval_sums = self._eval_sums, None
        metrics = self.adapter.read(book)
        if exact:
            output.metrics[f"{metric_key_prefix}_loss"] = _mean(channel().gather("evaluation", sums))
        for name, value in metrics.items():  # one of the user's own by that name stays
            output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        items = self.adapter.items(inputs)
        if self._eval_sums is not None and not items:
            return torch.zeros((), device=self.args.device), None, None
        with self.adapter.alone(inputs, items):
            value, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if self._eval_sums is not None:
            terms = self.adapter.evaluation_terms(value.item(), inputs, items)
            self._eval_sums = self._eval_sums or [[0.0, 0] for _ in terms]
            for sums, (mean, count) in zip(self._eval_sums, terms, strict=True):
                sums[0] += mean * count
                sums[1] += count
        return value, logits, labels


def _mean(ranks: list[list]) -> float:
    """Return the sum of the means of each term, from each rank's sums and counts; a rank without batches has none."""
    terms = list(zip(*(sums for sums in ranks if sums), strict=True))
    counts = [sum(count for _, count in term) for term in terms]
    if not counts or not all(counts):
        return float("nan")
    return sum(sum(total for total, _ in term) / count for term, count in zip(terms, counts, strict=True))
