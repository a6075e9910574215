"""Passes over data that change nothing: each sample on one rank, and the results of all in the order of the data."""

import time
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader

from ..data import user_loader
from ..launch.channel import channel
from ..policies.aggregation import AggregationMethod


class EvaluationMixin:
    """Evaluation, for [`MultiGPUTrainer`]."""

    def batches(self, dataloader: DataLoader):
        """
        This rank's batches of a loader, on its device, each sample on one rank: for a pass of one's own.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]):
                Of the whole data set, the same on every rank; what its `drop_last` would leave out comes too.

        Example:

        ```python
        scores = [score for batch in trainer.batches(loader) for score in judge(model, batch)]
        scores = trainer.gather(scores)  # of the whole data set, in its order, on every rank
        ```
        """
        self.setup()
        self._given = []
        for batch in self._dealt(dataloader):
            self._given += batch.samples
            yield send_to_device(batch.inputs, self.accelerator.device)

    def _dealt(self, dataloader: DataLoader):
        return user_loader.for_evaluation(dataloader, self.place, self.plugin.balance_tokens, self._draw)

    def gather(self, results: Sequence | torch.Tensor) -> list | torch.Tensor:
        """
        One result a sample, of all ranks, in the order of the data set and without repeats, on every rank.

        Args:
            results (`Sequence` or `torch.Tensor`):
                This rank's, one for each sample of the last [`MultiGPUTrainer.batches`], in that order.

        Returns:
            `list`, or `torch.Tensor` of shape `(samples, ...)` on the CPU if tensors were given.

        Raises:
            ValueError: if there are more or fewer results than samples.
        """
        if len(results) != len(self._given):
            raise ValueError(
                f"gather() got {len(results)} results, but the last pass gave rank {self.place.rank} {len(self._given)} "
                "samples. Pass one result for each, in the order of batches()."
            )
        own = [result.detach().cpu() if isinstance(result, torch.Tensor) else result for result in results]
        everyone = gather_object(list(zip(self._given, own, strict=True)))
        ordered = [result for _, result in sorted(everyone, key=lambda pair: pair[0])]
        return torch.stack(ordered) if ordered and isinstance(ordered[0], torch.Tensor) else ordered

    @torch.no_grad()
    def evaluate(self, dataloader: DataLoader) -> dict[str, float]:
        """
        The mean loss over a loader: over all its tokens for `TOKEN_MEAN`, else over its samples; nan if nothing has a loss.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]): Of the whole data set, the same on every rank.

        Returns:
            `dict` with `eval_loss`, `eval_samples` and `eval_runtime` (seconds), the same on every rank.
        """
        self.setup()
        was_training, began_s = self.model.training, time.perf_counter()
        self.model.eval()
        loss, weight, samples = 0.0, 0, 0
        for batch in self._dealt(dataloader):
            by_tokens = self.aggregation.method is AggregationMethod.TOKEN_MEAN
            items = self._count_items(batch.inputs)
            share = items if by_tokens or not items else len(batch.samples)
            samples += len(batch.samples)
            if share:
                inputs = send_to_device(batch.inputs, self.accelerator.device)
                loss, weight = loss + float(self._loss_fn(self.model, inputs)) * share, weight + share
        self.model.train(was_training)
        losses, weights, counts = zip(*channel().gather("evaluation", [loss, weight, samples]), strict=True)
        return {
            "eval_loss": sum(losses) / sum(weights) if any(weights) else float("nan"),
            "eval_samples": sum(counts),
            "eval_runtime": time.perf_counter() - began_s,
        }
