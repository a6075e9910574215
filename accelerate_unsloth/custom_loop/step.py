"""
One optimizer step of a custom training loop.

A rank runs the forwards and backwards of its own micro-batches. Then one reduction makes one gradient of all ranks', so a
rank may have any number of micro-batches, or none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..data.loader import count_items, count_tokens
from ..data.user_loader import LocalBatch
from ..launch.topology import topology
from ..policies import aggregation
from ..policies.aggregation import AggregationMethod
from ..reduction import StepTotals
from ..reliability import nonfinite


@dataclass
class Step:
    """State of one optimizer step on this rank."""

    batches: list[LocalBatch]
    items: list[int]  # loss items of each micro-batch
    loss: torch.Tensor  # weighted sum of the losses so far, a float64 scalar

    @property
    def tokens(self) -> int:
        return sum(count_tokens(batch.inputs) for batch in self.batches if isinstance(batch.inputs, Mapping))

    @property
    def samples(self) -> list:
        return [sample for batch in self.batches for sample in batch.samples]


def run(trainer, batches: list[LocalBatch] | None) -> StepTotals | None:
    """
    Run one optimizer step of a [`MultiGPUTrainer`]; all ranks call it together.

    `batches` are `None` if this rank has no data left. Return `None` if no rank has any.
    """
    zero = torch.zeros((), device=trainer.accelerator.device, dtype=torch.float64)
    step = Step(batches or [], [trainer.count_items(batch.inputs) for batch in batches or []], zero)
    tokens = step.tokens
    trainer.monitor.begin_work()
    _learn(trainer, step)
    worked = trainer.monitor.end_work(tokens)
    totals = trainer.reducer.reduce(
        step.loss,
        zero + aggregation.rank_weight(trainer.aggregation.method, step.items),
        zero + tokens,
        wants_stop=batches is None,
        check_gradients=trainer.accelerator.scaler is None,
    )
    trainer.monitor.add_work(worked)
    if totals.stop_votes == topology().world_size:
        trainer.optimizer.zero_grad()
        return None
    if trainer.aggregation.method is AggregationMethod.SUM:
        totals = _as_sum(trainer, totals)
    _update(trainer, totals, step.samples)
    return totals


def _learn(trainer, step: Step) -> None:
    """Run forward and backward of each micro-batch that has a loss."""
    weights = aggregation.weights(trainer.aggregation.method, step.items)
    for batch, items, weight in zip(step.batches, step.items, weights, strict=True):
        if items:
            inputs = send_to_device(batch.inputs, trainer.accelerator.device, non_blocking=True)
            loss = trainer.loss_fn(trainer.model, inputs) * weight
            trainer.accelerator.backward(loss)
            step.loss = step.loss + loss.detach()
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.scale(step.loss)  # a scaler that has scaled nothing cannot take part in the step


def _as_sum(trainer, totals: StepTotals) -> StepTotals:
    """Turn the mean over ranks back into a sum."""
    gradients = [p.grad for p in trainer.trainable if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, float(totals.items))
    return replace(totals, loss=totals.loss * totals.items)


def _update(trainer, totals: StepTotals, samples: list) -> None:
    """Step the optimizer and the scheduler, unless the step is skipped, and call the callbacks."""
    accelerator, optimizer = trainer.accelerator, trainer.optimizer
    trainer.step_in_epoch += 1
    trainer.global_step += 1
    trainer.num_tokens += int(totals.tokens)
    logs = {"loss": float(totals.loss), "epoch": trainer.epoch, "num_tokens": trainer.num_tokens}
    logs["learning_rate"] = optimizer.param_groups[0]["lr"]
    message = nonfinite.handle(
        totals.nonfinite_ranks,
        trainer.global_step,
        samples,
        trainer.plugin.on_nonfinite,
        trainer.trainable,
        scaled=accelerator.scaler is not None,
    )
    if message and accelerator.is_main_process:
        print(message)
    if not message and trainer.max_grad_norm is not None:
        logs["grad_norm"] = float(accelerator.clip_grad_norm_(trainer.trainable, trainer.max_grad_norm))
    optimizer.step()
    # A scaler skips a step, too, where gradients overflow.
    if trainer.scheduler is not None and not message and not accelerator.optimizer_step_was_skipped:
        trainer.scheduler.step()
    optimizer.zero_grad()
    if accelerator.is_main_process:
        for callback in trainer.callbacks:
            callback(dict(logs), trainer.global_step)


def loss_of_model(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss that a model computes; raise `ValueError` if it computes none, or the batch is no dictionary."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch is a {type(batch).__name__}, and model(**batch) needs a dict. Pass loss_fn=, a function of model and batch."
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"The model gave no loss for a batch of {', '.join(batch)}. Add labels, or pass loss_fn=.")
    return loss


def predicts_next_token(model: torch.nn.Module) -> bool:
    """Return whether the model's loss is transformers' for causal language models, which shifts its labels."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return getattr(model, "loss_type", None) == "ForCausalLM"


def make_item_counter(shifted: bool) -> Callable[[Any], int]:
    """Return a function that counts the loss items of a batch: positions of a dictionary with labels, else rows."""
    return lambda batch: count_items(batch, shifted) if isinstance(batch, Mapping) else len(batch)
