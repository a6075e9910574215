"""
A loss on one rank alone: without collectives, with a weight, and with its metrics kept as sums.

Ranks have different numbers of micro-batches, so whatever TRL gathers inside a loss would hang. What it gathers are
metrics; they are kept as sums here and reduced over all ranks where they are logged.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import trl
from transformers import Trainer

from ..patches import patched
from ..reduction import sum_over_ranks

_COLLECTIVES = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")


def without_collectives(accelerator) -> AbstractContextManager:
    """Return a context in which an accelerator's collectives return their argument, as they do in one process."""
    return patched(accelerator, **dict.fromkeys(_COLLECTIVES, lambda value, *args, **kwargs: value))


def is_custom(trainer) -> bool:
    """Return whether the loss is the user's: a `compute_loss_func`, or an override of `compute_loss`."""
    if trainer.compute_loss_func is not None:
        return True
    known = {*trl.SFTTrainer.__mro__, *Trainer.__mro__}
    defined_by = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    return defined_by not in known


@torch.no_grad()
def count_ratio(trainer, balance, inputs: dict[str, Any], items: int) -> float | None:
    """
    Return the loss of a micro-batch for twice its item count over that for its item count; `None` if that is no number.

    RNG states are kept. The balancing loss of experts is left out, since the count does not divide it.
    """
    device, losses = trainer.args.device, []
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # the Trainer sets it anew before each step
    for count in (items, 2 * items):
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            without_collectives(trainer.accelerator),
            nullcontext() if balance is None else balance.left_out(),
            trainer.compute_loss_context_manager(),
        ):
            prepared = trainer._prepare_inputs(dict(inputs))
            count = torch.tensor(count, device=device)
            losses.append(float(trainer.compute_loss(trainer.model_wrapped, prepared, num_items_in_batch=count)))
    first, second = losses
    ratio = second / first if first else float("nan")
    return ratio if abs(ratio) < float("inf") else None


class MetricBook:
    """
    Collects what TRL's losses note for each micro-batch, over the items of all ranks.

    Of `means` it keeps the mean, of `extremes` the `"min"` or the `"max"`.
    """

    def __init__(self, means: tuple[str, ...], extremes: dict[str, str]):
        self._names, self._extremes = means, extremes
        self._sums, self._items = dict.fromkeys(means, 0.0), dict.fromkeys(means, 0)
        self._largest = dict.fromkeys(self._extremes, float("-inf"))  # of a minimum its negative

    def empty(self) -> "MetricBook":
        """Return a book of the same metrics."""
        return MetricBook(self._names, self._extremes)

    def take(self, noted: dict[str, list[float]], items: dict[str, int]) -> None:
        """Add what a loss has noted, each a mean over so many items."""
        for name in self._names:
            for value in noted.get(name, ()):
                self._sums[name] += value * items[name]
                self._items[name] += items[name]
        for name, kind in self._extremes.items():
            signed = [-value if kind == "min" else value for value in noted.get(name, ())]
            self._largest[name] = max([self._largest[name], *signed])

    def read(self, device: torch.device) -> dict[str, float]:
        """Return the metrics of all ranks, and begin anew; all ranks come here together."""
        totals = torch.tensor([*self._sums.values(), *self._items.values()], dtype=torch.float64, device=device)
        largest = torch.tensor([*self._largest.values()], dtype=torch.float64, device=device)
        sum_over_ranks(totals)
        if self._extremes and dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        sums, items = totals.tolist()[: len(self._names)], totals.tolist()[len(self._names) :]
        found = {name: total / count for name, total, count in zip(self._names, sums, items, strict=True) if count}
        for (name, kind), value in zip(self._extremes.items(), largest.tolist(), strict=True):
            if value > float("-inf"):
                found[name] = -value if kind == "min" else value
        self.__init__(self._names, self._extremes)
        return found
