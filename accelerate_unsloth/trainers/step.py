"""
One optimizer step of one rank: its micro-batches, and what became of them.

Ranks do not meet inside a forward or backward, so a rank may split a micro-batch that does not fit, repeat it with
recomputation, or leave a sample out, while the others only see a slower step. The loss of a micro-batch is a sum divided by
the item count of the whole step, so two halves give the same gradient as the whole.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache

from ..data.loader import MicroBatch

# Repeating a micro-batch takes a copy of the gradients before it: up to 1 GiB in float32.
MAX_REPEATABLE_VALUES = 2**28


def can_be_repeated(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Return whether the gradients of these parameters are small enough to repeat a micro-batch that does not fit."""
    return sum(p.numel() for p in parameters if p.requires_grad) <= MAX_REPEATABLE_VALUES


def gradient_bytes(parameters: Sequence[torch.nn.Parameter]) -> int:
    """Return what all micro-batches of a step but the first find in memory: the gradients so far, and a copy to repeat it."""
    return sum(p.nbytes for p in parameters) * (2 if can_be_repeated(parameters) else 1)


@dataclass
class Step:
    """State of one optimizer step on this rank."""

    micro_batches: list[MicroBatch]  # all of them
    items: torch.Tensor  # that the rank's mean loss is over (tokens, rows, pairs), a float64 scalar
    tokens: int  # of the micro-batches
    loss: torch.Tensor  # sum of the losses so far, each divided by `items`, a float64 scalar
    number: int = 0  # from 1, for messages
    skipped_items: int = 0  # of samples that did not fit the memory
    failed_tokens: int = 0  # of the last micro-batch that did not fit

    @classmethod
    def of(cls, micro_batches: list[MicroBatch], items: torch.Tensor | float, tokens: int, device, number=0) -> "Step":
        """Begin a step."""
        zero = torch.zeros((), device=device, dtype=torch.float64)
        return cls(micro_batches, torch.as_tensor(items, device=device, dtype=torch.float64), tokens, zero, number)

    @property
    def samples(self) -> list[int]:
        """Indices of all samples of the step on this rank."""
        return [index for batch in self.micro_batches for index in batch.samples]

    def leave_out_skipped(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Before the reduction: make loss and gradients a mean over the items that were learned from."""
        if not self.skipped_items:
            return
        left = self.items - self.skipped_items
        factor = self.items / left.clamp(min=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self.loss *= factor
        self.items, self.skipped_items = left, 0


class Work(Protocol):
    """What a step has to know of a trainer's loss; [`LossAdapter`] is that of TRL's trainers."""

    def learn(self, inputs: Any, items: int, step: Step) -> torch.Tensor:
        """Run forward and backward of a collated micro-batch; return its loss, divided by the items of the step."""

    def collate(self, samples: Sequence[int]) -> Any:
        """Return the collated micro-batch of samples of the training data."""

    def items(self, inputs: Any) -> int:
        """Return how many items the loss of a collated micro-batch is over."""

    def tokens(self, inputs: Any) -> int:
        """Return the tokens of a collated micro-batch."""

    def length(self, sample: int) -> int:
        """Return the tokens of a sample, for messages."""


@dataclass(eq=False)
class StepRunner:
    """Runs micro-batches, and splits, repeats or skips what does not fit the memory."""

    work: Work
    trainable: Callable[[], list[torch.nn.Parameter]]  # those that are trained, once training has begun
    on_oversized: str  # the plugin's option: "stop" or "skip" a sample that does not fit alone
    fall_back: Callable[[str], bool]  # `fall_back(why)`: recompute activations from here on, if that is allowed
    may_fall_back: Callable[[], bool]  # whether it would be
    rank: int  # for messages
    skipped_samples: list[int] = field(default_factory=list)
    fell_back: bool = False  # whether this rank recomputes since a sample did not fit; `_end_step` resets it
    _has_split: bool = False

    def run(self, step: Step, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """
        Run some micro-batches of a step, add their losses to it, and return the sum of these.

        Raises:
            torch.OutOfMemoryError: if one does not fit and cannot be split: because it is a single sample that is not to be
                skipped, because its samples are not known, or because the gradients are too large to be copied.
        """
        total = torch.zeros((), device=step.loss.device)
        for batch in micro_batches:
            if batch.items:  # nothing can be learned where every label is masked
                total = total + self._learn(step, batch)
        step.loss += total
        return total

    def _learn(self, step: Step, batch: MicroBatch) -> torch.Tensor:
        trainable = self.trainable() if batch.samples else []
        samples = batch.samples if can_be_repeated(trainable) else []
        kept = []
        try:
            # A backward that breaks off has already added to some gradients.
            if samples:
                kept = [(p, None if p.grad is None else p.grad.clone()) for p in trainable]
            return self.work.learn(batch.inputs, batch.items, step)
        except torch.OutOfMemoryError as error:
            stops = len(samples) == 1 and self.on_oversized == "stop" and not self.may_fall_back()
            if not samples or stops:
                raise self._explained(error, samples) from error
        # Outside of the except block, whose traceback holds the activations.
        step.failed_tokens = self.work.tokens(batch.inputs)
        batch.inputs = {}
        for parameter, gradient in kept:
            parameter.grad = gradient
        if torch.cuda.is_available():
            clear_device_cache(garbage_collection=True)
        if len(samples) > 1:
            return self._split(step, samples)
        if self.fall_back("a sample did not fit without it"):
            self.fell_back = True
            return self._learn(step, MicroBatch(self.work.collate(samples), batch.items, samples))
        return self._skip(step, samples[0], batch.items)

    def _split(self, step: Step, samples: list[int]) -> torch.Tensor:
        self._say_once()
        half, loss = len(samples) // 2, torch.zeros((), device=step.loss.device)
        for part in (samples[:half], samples[half:]):
            inputs = self.work.collate(part)
            if items := self.work.items(inputs):
                loss = loss + self._learn(step, MicroBatch(inputs, items, part))
        return loss

    def _say_once(self) -> None:
        """On whichever rank it is, so not through a logger, which other ranks mute."""
        if not self._has_split:
            self._has_split = True
            print(f"[rank {self.rank}] a micro-batch did not fit the memory and is split in two.", file=sys.stderr)

    def _skip(self, step: Step, sample: int, items: int) -> torch.Tensor:
        length = self.work.length(sample)
        print(
            f"[rank {self.rank}] sample {sample}, of {length} tokens, does not fit the memory and is left out of step "
            f"{step.number}.",
            file=sys.stderr,
        )
        self.skipped_samples.append(sample)
        step.skipped_items += items
        return torch.zeros((), device=step.loss.device)

    def _explained(self, error: torch.OutOfMemoryError, samples: list[int]) -> torch.OutOfMemoryError:
        what, remedy = "a micro-batch", "or a smaller per_device_train_batch_size"
        if samples:
            what = f"sample {samples[0]} alone, of {self.work.length(samples[0])} tokens,"
            remedy = "or set on_oversized='skip' to leave such samples out"
        return torch.OutOfMemoryError(
            f"On rank {self.rank} {what} does not fit the memory ({error}). Use gradient checkpointing, a smaller "
            f"max_length or 4-bit weights, {remedy}."
        )
