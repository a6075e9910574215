"""
Choose the samples of each optimizer step, and assign them to ranks and micro-batches.

The effective batches of an epoch depend on seed, epoch and effective batch size, never on the number of processes, and
are those of the stock Trainer with the same seed. Only their assignment to ranks and micro-batches depends on the
launch: by number, or by cost if lengths are known. A last, incomplete effective batch is spread over all ranks; no
sample is repeated to fill it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from .packing import RowCost, assign_balanced, assign_in_sizes, split_micro_batches


def epoch_order(
    num_samples: int,
    seed: int,
    epoch: int,
    strategy: str = "random",
    lengths: Sequence[int] | None = None,
    effective_batch: int = 1,
) -> list[int]:
    """
    Return the order in which an epoch visits its samples; raise `ValueError` for a strategy that cannot be followed.

    `strategy` is the Trainer's `train_sampling_strategy`. `lengths`, the tokens of each sample, and `effective_batch`,
    the size of the groups, are for `"group_by_length"`.
    """
    if strategy == "sequential":
        return list(range(num_samples))
    # `seed + epoch` is how accelerate's SeedableRandomSampler seeds an epoch (accelerate 1.15, data_loader.py).
    generator = torch.Generator().manual_seed(seed + epoch)
    if strategy in ("random", "batch_rebalance"):  # ranks are balanced with any order
        return torch.randperm(num_samples, generator=generator).tolist()
    if strategy == "group_by_length":
        if lengths is None:
            raise ValueError(
                "train_sampling_strategy='group_by_length' takes the lengths of the samples, which are not known without "
                "an input_ids column. Use 'random'."
            )
        return get_length_grouped_indices(list(lengths), effective_batch, generator=generator)
    raise ValueError(
        f"train_sampling_strategy={strategy!r} is not known; use 'random', 'sequential', 'group_by_length' or "
        "'batch_rebalance'."
    )


def assign_by_number(
    samples: Sequence[int], world_size: int, accumulation: int, micro_batch: int
) -> list[list[list[int]]]:
    """
    Split one effective batch into micro-batches by number: `[micro_step][rank] -> samples`.

    A full effective batch, of `world_size * accumulation * micro_batch` samples, is split as in the stock Trainer. An
    incomplete one takes the fewest micro-steps that hold it, spread over all ranks; the other micro-steps stay empty.

    Example:

    ```python
    >>> from accelerate_unsloth.data.sampler import assign_by_number
    >>> assign_by_number([7, 8, 9], world_size=2, accumulation=2, micro_batch=1)
    [[[7], [8]], [[9], []]]
    ```
    """
    steps_needed = -(-len(samples) // (world_size * micro_batch))
    micro_steps, start = [], 0
    for step in range(accumulation):
        remaining = len(samples) - start
        # Spread over the remaining steps, then over the ranks.
        of_step = -(-remaining // (steps_needed - step)) if step < steps_needed else 0
        row = []
        for rank in range(world_size):
            size = of_step // world_size + (rank < of_step % world_size)
            row.append(list(samples[start : start + size]))
            start += size
        micro_steps.append(row)
    return micro_steps


@dataclass(eq=False, repr=False)
class EffectiveBatchSampler(Sampler):
    """
    Yield what one rank does in each micro-step of the Trainer, `accumulation` of which make an optimizer step.

    A micro-step is a list of micro-batches: one as the user's arguments split it, none if the rank's share needs
    fewer, several if the `token_budget` requires more.

    Attributes:
        token_budget (`int` or `None`): Most tokens of a micro-batch; may be set until the first iteration.
        first_step (`int`): Step at which the next iteration begins, for a run that resumes in the middle of an epoch.

    Example:

    ```python
    >>> from accelerate_unsloth.data.sampler import EffectiveBatchSampler
    >>> sampler = EffectiveBatchSampler(5, world_size=2, rank=1, micro_batch=1, accumulation=2, seed=0, strategy="sequential")
    >>> list(sampler)
    [[[1]], [[3]], [], []]
    ```
    """

    num_samples: int
    world_size: int
    rank: int
    micro_batch: int  # samples of one micro-batch (`per_device_train_batch_size`)
    accumulation: int  # micro-steps of an optimizer step (`gradient_accumulation_steps`)
    seed: int  # of the run
    drop_last: bool = False  # drop an incomplete last effective batch
    strategy: str = "random"  # see `epoch_order`
    lengths: Sequence[int] | None = None  # tokens of each sample, if they are known
    balance: bool = False  # assign by cost instead of by number; needs `lengths`
    cost: RowCost = field(default_factory=RowCost)

    def __post_init__(self):
        self.lengths = None if self.lengths is None else np.asarray(self.lengths)
        self.token_budget: int | None = None
        self.first_step = 0
        self.effective_batch = self.world_size * self.accumulation * self.micro_batch
        whole, rest = divmod(self.num_samples, self.effective_batch)
        self.num_steps = whole if self.drop_last else whole + (rest > 0)
        self.epoch = 0
        self._epoch_of_order, self._order_of_epoch = None, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[list[int]]]:
        for step in range(self.first_step, self.num_steps):
            yield from self._micro_steps(self.plan(step)[self.rank])

    def plan(self, step: int) -> list[list[list[int]]]:
        """Return the samples of step `step` of the current epoch: `[rank][micro_batch] -> samples`."""
        order = self._order(self.epoch)
        samples = order[step * self.effective_batch : (step + 1) * self.effective_batch]
        lengths = None if self.lengths is None else self.lengths[samples].tolist()
        if self.balance and self.token_budget is not None:
            return assign_balanced(samples, lengths, self.world_size, self.cost, self.token_budget)
        rows = assign_by_number(samples, self.world_size, self.accumulation, self.micro_batch)
        ranks = [[row[rank] for row in rows if row[rank]] for rank in range(self.world_size)]
        if self.balance:
            sizes = [[len(batch) for batch in batches] for batches in ranks]
            return assign_in_sizes(samples, lengths, sizes, self.cost)
        if self.token_budget is None:
            return ranks
        shares = [[sample for batch in batches for sample in batch] for batches in ranks]
        return [
            split_micro_batches(share, self.lengths[share].tolist(), self.cost, self.token_budget) for share in shares
        ]

    def _micro_steps(self, batches: list[list[int]]) -> Iterator[list[list[int]]]:
        """Spread a rank's micro-batches over the micro-steps that the Trainer counts."""
        if len(batches) <= self.accumulation:
            yield from ([batch] for batch in batches)
            yield from [[]] * (self.accumulation - len(batches))
            return
        edges = [len(batches) * turn // self.accumulation for turn in range(self.accumulation + 1)]
        yield from (batches[start:end] for start, end in pairwise(edges))

    def _order(self, epoch: int) -> list[int]:
        """Return the order of an epoch, computed once for all its steps."""
        if self._epoch_of_order != epoch:
            self._epoch_of_order = epoch
            self._order_of_epoch = epoch_order(
                self.num_samples, self.seed, epoch, self.strategy, self.lengths, self.effective_batch
            )
        return self._order_of_epoch


class EvaluationSampler(Sampler):
    """
    Yield the evaluation batches of one rank: all samples once, round-robin over the ranks.

    With `lengths`, samples of similar length share a batch, longest first. Batches that run at the same time take as
    long, little is padded, and a batch that does not fit fails at once. The mean loss does not depend on the order.

    Example:

    ```python
    >>> from accelerate_unsloth.data.sampler import EvaluationSampler
    >>> list(EvaluationSampler(5, world_size=2, rank=0, batch_size=2))
    [[0, 1], [4]]
    ```
    """

    def __init__(
        self, num_samples: int, world_size: int, rank: int, batch_size: int, lengths: Sequence[int] | None = None
    ):
        self._starts = range(rank * batch_size, num_samples, world_size * batch_size)
        self._num_samples, self._batch_size, self._lengths = num_samples, batch_size, lengths

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        order = range(self._num_samples)
        if self._lengths is not None:
            order = np.argsort(-np.asarray(self._lengths), kind="stable").tolist()
        yield from (list(order[start : start + self._batch_size]) for start in self._starts)
