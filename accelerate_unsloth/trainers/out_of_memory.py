"""
A micro-batch that does not fit is cut in two and tried again, on the rank where it happened and nowhere else.

That is possible because ranks do not meet inside a forward or backward: the others only see a slower step. The loss of a
micro-batch is a sum divided by the token count of the whole step, so two halves give the same gradient as the whole.
"""

import gc
import sys
from contextlib import nullcontext

import torch

from ..data.loader import count_tokens
from ..launch.topology import topology


class OutOfMemoryMixin:
    """Surviving a micro-batch that is too large, for [`DistributedTrainerMixin`]."""

    def __init__(self, *args, **kwargs):
        self._skipped_items, self._cut_before, self._failed_tokens = 0, False, 0
        self._recomputes_from_now_on = False
        self.skipped_samples: list[int] = []
        super().__init__(*args, **kwargs)

    def _learn(self, model, batch, num_items_in_batch) -> torch.Tensor:
        """
        Forward and backward of a micro-batch; its loss.

        Args:
            batch (`MicroBatch`): With the indices of its samples, without which it cannot be cut.

        Raises:
            torch.OutOfMemoryError: if it does not fit and cannot be cut, because it is a single sample that is not to
                be skipped, or because its samples are not known.
        """
        # A copy of large gradients costs more than it saves.
        samples = batch.samples if self._gradients_are_small else []
        # Few and small with adapters: a backward that breaks off has already added to some of them.
        trainable = [p for p in model.parameters() if p.requires_grad] if samples else []
        kept = [(p, None if p.grad is None else p.grad.clone()) for p in trainable]
        try:
            return self._learn_at_once(model, batch.inputs, num_items_in_batch, batch.items)
        except torch.OutOfMemoryError as error:
            stops = len(samples) == 1 and self.plugin.on_oversized == "stop" and not self.checkpointing.may_recompute
            if not samples or stops:
                raise self._explained(error, samples) from error
        # Outside of the except block, whose traceback holds the activations.
        self._failed_tokens = count_tokens(batch.inputs)
        batch.inputs = {}
        for parameter, gradient in kept:
            parameter.grad = gradient
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        if len(samples) == 1 and self._recompute_instead("a sample did not fit without it"):
            self._recomputes_from_now_on = True  # which the other ranks learn at the end of the step
            retried = type(batch)(self._collate(samples), batch.items, samples)
            return self._learn(model, retried, num_items_in_batch)
        if len(samples) == 1:
            return self._skip(samples[0], batch.items)
        half = len(samples) // 2
        if not self._cut_before:  # on whichever rank it is, so not through a logger, which other ranks mute
            self._cut_before = True
            print(f"[rank {topology().rank}] a micro-batch did not fit the memory and is cut in two.", file=sys.stderr)
        loss = torch.zeros((), device=self.args.device)
        for part in (samples[:half], samples[half:]):
            inputs = self._collate(part)
            items = self._count_items(inputs)
            if items:
                loss = loss + self._learn(model, type(batch)(inputs, items, part), num_items_in_batch)
        return loss

    def _plan_smaller(self) -> None:
        """At the end of a step in which a rank ran out of memory; all ranks come here together."""
        self._lower_budget(self._failed_tokens)
        self._failed_tokens = 0

    def _learn_at_once(self, model, inputs, num_items_in_batch, items: int) -> torch.Tensor:
        weight, counted = None, self._step_items
        if num_items_in_batch is None or (self.loss is not None and not self.loss.divides):
            # The loss is a mean over the micro-batch.
            num_items_in_batch, weight, counted = None, items / self._step_items, items
        balance = nullcontext() if self._balance is None else self._balance.weighing(counted)
        accumulation, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        try:
            with self._alone(items, weight), balance:
                return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = accumulation

    def _learn_in_step(self, model, batch, num_items_in_batch) -> torch.Tensor:
        """
        Forward and backward where ranks meet in every backward, so that none of them can cut a micro-batch on its own.

        Raises:
            torch.OutOfMemoryError: if it does not fit.
        """
        if torch.is_tensor(num_items_in_batch):  # zero where no rank has a label: the loss is zero then, not nan
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        try:
            with self._alone(batch.items):
                return super().training_step(model, batch.inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise self._explained(error, []) from error

    def _explained(self, error: torch.OutOfMemoryError, samples: list[int]) -> torch.OutOfMemoryError:
        what, remedy = "a micro-batch", "or a smaller per_device_train_batch_size"
        if samples:
            what = f"sample {samples[0]} alone, of {self._length(samples[0])} tokens,"
            remedy = "or set on_oversized='skip' to leave such samples out"
        elif self.gradient_sync.mode == "overlapped":
            remedy = "or gradient_sync='after_backward', under which it is cut in two"
        return torch.OutOfMemoryError(
            f"On rank {topology().rank} {what} does not fit the memory ({error}). Use gradient checkpointing, a smaller "
            f"max_length or 4-bit weights, {remedy}."
        )

    def _skip(self, sample: int, items: int) -> torch.Tensor:
        print(
            f"[rank {topology().rank}] sample {sample}, of {self._length(sample)} tokens, does not fit the memory and is "
            f"left out of step {self.state.global_step + 1}.",
            file=sys.stderr,
        )
        self.skipped_samples.append(sample)
        self._skipped_items += items
        return torch.zeros((), device=self.args.device)

    def _forget_skipped_items(self) -> None:
        """Before the reduction of a step: its mean is over the items that were learnt from."""
        if not self._skipped_items:
            return
        left = self._step_items - self._skipped_items
        factor = self._step_items / left.clamp(min=1.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._step_loss *= factor
        self._step_items, self._skipped_items = left, 0

    def _collate(self, samples: list[int]):
        loader = self.callback_handler.train_dataloader
        return loader.collate_fn([loader.dataset[index] for index in samples])

    def _length(self, sample: int) -> int:
        return len(self.train_dataset[sample].get("input_ids", ()))
