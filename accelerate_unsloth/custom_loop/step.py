"""One optimizer step of a loop of one's own: own forwards and backwards, the one reduction, the optimizer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..data.loader import count_tokens
from ..data.user_loader import DealtBatch
from ..policies import aggregation
from ..policies.aggregation import AggregationMethod
from ..reduction import StepTotals
from ..reliability import nonfinite


class StepMixin:
    """The step, for [`MultiGPUTrainer`]."""

    def _step(self, batches: list[DealtBatch] | None) -> StepTotals | None:
        """One optimizer step of all ranks; `None` if none of them has anything left."""
        work, method = batches or [], self.aggregation.method
        items = [self._count_items(batch.inputs) for batch in work]
        tokens = sum(count_tokens(b.inputs) for b in work if isinstance(b.inputs, Mapping))
        device = self.accelerator.device
        own_loss = torch.zeros((), device=device, dtype=torch.float64)
        self._monitor.begin_work()
        for batch, count, weight in zip(work, items, aggregation.weights(method, items), strict=True):
            if count:
                own_loss += self._learn(batch.inputs, weight)
        worked = self._monitor.end_work(tokens)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(own_loss)  # one that has scaled nothing cannot take part in the step
        totals = self._reducer.reduce(
            own_loss,
            torch.tensor(aggregation.rank_weight(method, items), device=device, dtype=torch.float64),
            torch.tensor(tokens, device=device, dtype=torch.float64),
            wants_stop=batches is None,
            check_gradients=self.accelerator.scaler is None,
        )
        self._monitor.add_work(worked)
        if totals.stop_votes == self.place.world_size:
            self.optimizer.zero_grad()
            return None
        if method is AggregationMethod.SUM:
            totals = self._as_sum(totals)
        self._finish_step(totals, [sample for batch in work for sample in batch.samples])
        return totals

    def _learn(self, inputs: Any, weight: float) -> torch.Tensor:
        """Forward and backward of one micro-batch; what it adds to this rank's loss."""
        loss = self._loss_fn(self.model, send_to_device(inputs, self.accelerator.device, non_blocking=True)) * weight
        self.accelerator.backward(loss)
        return loss.detach()

    def _as_sum(self, totals: StepTotals) -> StepTotals:
        """The sum that a mean over ranks was made from."""
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, float(totals.items))
        return replace(totals, loss=totals.loss * totals.items)

    def _finish_step(self, totals: StepTotals, samples: list) -> None:
        self.step_in_epoch += 1
        self.global_step += 1
        self.num_tokens += int(totals.tokens)
        logs = {"loss": float(totals.loss), "epoch": self.epoch, "num_tokens": self.num_tokens}
        logs["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        scaled, skipped = self.accelerator.scaler is not None, bool(totals.nonfinite_ranks)
        said = nonfinite.handle(
            totals.nonfinite_ranks, self.global_step, samples, self.plugin.on_nonfinite, self.trainable, scaled
        )
        if said and self.accelerator.is_main_process:
            print(said)
        if not skipped and self.max_grad_norm is not None:
            logs["grad_norm"] = float(self.accelerator.clip_grad_norm_(self.trainable, self.max_grad_norm))
        self.optimizer.step()
        skipped = skipped or self.accelerator.optimizer_step_was_skipped  # the scaler's, where gradients overflow
        if self.scheduler is not None and not skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback(dict(logs), self.global_step)
