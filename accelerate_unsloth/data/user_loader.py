"""A user's own DataLoader, dealt over the ranks: who gets which of its samples, and what they were."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from .lengths import lengths_of
from .loader import MicroStep, PlannedDataLoader, worker_seeding
from .loader_order import as_drawn, draw, order_of
from .packing import RowCost
from .sampler import EffectiveBatchSampler, EvaluationSampler


@dataclass(frozen=True)
class Place:
    """Which rank of how many; both come in as numbers, so that dealing can be looked at without processes."""

    rank: int
    world_size: int


@dataclass
class DealtBatch:
    """A micro-batch of this rank, and the places of its samples in the order of the whole data set."""

    inputs: Any
    samples: list


class PlannedEpochs:
    """
    Epochs formed anew from a seed, in effective batches that do not depend on the number of processes.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): Of the whole data set.
        sampler ([`EffectiveBatchSampler`]): Of this rank.

    Attributes:
        facts (`dict`): What a run that goes on inside of an epoch has to have in common with the one that began it.
    """

    def __init__(self, loader: DataLoader, sampler: EffectiveBatchSampler):
        self.accumulation = sampler.accumulation
        self._loader = PlannedDataLoader(loader.dataset, sampler, loader.collate_fn, **_options(loader, sampler.rank))
        lengths = None if sampler.lengths is None else np.ascontiguousarray(sampler.lengths, dtype=np.int64)
        self.facts = {
            "order of the samples": sampler.strategy,
            "samples": sampler.num_samples,
            "samples of a step": sampler.effective_batch,
            "drop_last": loader.drop_last,
            "lengths": None if lengths is None else hashlib.sha256(lengths.tobytes()).hexdigest()[:12],
        }

    def draw(self) -> None:
        """The order is the seed's."""

    def num_steps(self, order: None) -> int:
        return self._loader.batch_sampler.num_steps

    def steps(self, epoch: int, first_step: int, order: None) -> Iterator[list[DealtBatch]]:
        """The micro-batches of this rank in each optimizer step from `first_step` on."""
        self._loader.batch_sampler.first_step = first_step
        self._loader.set_epoch(epoch)
        stream = iter(self._loader)
        while slots := list(islice(stream, self.accumulation)):
            yield _micro_batches(slots)


class DrawnEpochs:
    """
    Epochs whose batches a sampler of one's own draws, once for all ranks, taken by turns.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): Of the whole data set.
        place ([`Place`]): This rank.
        accumulation (`int`): Micro-batches of an optimizer step on each rank.
    """

    def __init__(self, loader: DataLoader, place: Place, accumulation: int):
        self._dealt, self._place = loader, place
        self._turns = place.world_size * accumulation
        self.accumulation = accumulation
        self.facts = {"order of the samples": "drawn", "micro-batches of a step": self._turns}
        if hasattr(loader.dataset, "__len__"):
            self.facts["samples"] = len(loader.dataset)

    def draw(self) -> list:
        return draw(self._dealt)

    def num_steps(self, order: list) -> int:
        return -(-len(order) // self._turns)

    def steps(self, epoch: int, first_step: int, order: list) -> Iterator[list[DealtBatch]]:
        left = as_drawn(self._dealt, order[first_step * self._turns :])
        stream = _load(self._dealt, left[self._place.rank :: self._place.world_size], self._place.rank)
        while batches := list(islice(stream, self.accumulation)):
            yield batches


class StreamedEpochs:
    """Epochs of a loader that gives the same batches on every rank, taken by turns; what is done is read again."""

    def __init__(self, loader: DataLoader, place: Place, accumulation: int):
        self._stream, self._place = loader, place
        self.accumulation = accumulation
        turns = place.world_size * accumulation
        self.facts = {
            "order of the samples": "stream",
            "micro-batches of a step": turns,
            "batch_size": loader.batch_size,
        }

    def draw(self) -> None:
        """The order is the stream's."""

    def num_steps(self, order: None) -> None:
        """Nobody knows before the end."""

    def steps(self, epoch: int, first_step: int, order: None) -> Iterator[list[DealtBatch]]:
        stream = _by_turns(self._stream, self._place)
        for _ in islice(stream, first_step * self.accumulation):
            continue
        while batches := list(islice(stream, self.accumulation)):
            yield batches


Epochs = PlannedEpochs | DrawnEpochs | StreamedEpochs


def for_training(
    loader: DataLoader,
    place: Place,
    accumulation: int,
    seed: int,
    balance: bool = True,
    lengths: Sequence[int] | None = None,
) -> Epochs:
    """
    The epochs of a loader, as this rank takes part in them.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): Of the whole data set, the same on every rank.
        place ([`Place`]): This rank.
        accumulation (`int`): Micro-batches of an optimizer step on each rank.
        seed (`int`): Of the order, if the loader shuffles.
        balance (`bool`, *optional*, defaults to `True`): Deal by tokens where lengths are known.
        lengths (`Sequence[int]`, *optional*): Tokens of each sample; by default those of a column `input_ids`.

    Raises:
        ValueError: for a loader that cannot be dealt (see [`order_of`]), lengths that are not one a sample, or lengths
            where batches stay as they are.
    """
    order = order_of(loader)
    if lengths is not None:
        _check_lengths(lengths, loader, order)
    if order == "stream":
        return StreamedEpochs(loader, place, accumulation)
    if order == "drawn":
        return DrawnEpochs(loader, place, accumulation)
    lengths = lengths_of(loader.dataset) if lengths is None else lengths
    sampler = EffectiveBatchSampler(
        len(loader.dataset),
        world_size=place.world_size,
        rank=place.rank,
        micro_batch=loader.batch_size,
        accumulation=accumulation,
        seed=seed,
        drop_last=loader.drop_last,
        strategy=order,
        lengths=lengths,
        balance=balance and lengths is not None and place.world_size > 1,
        cost=_cost(loader),
    )
    return PlannedEpochs(loader, sampler)


def _check_lengths(lengths: Sequence[int], loader: DataLoader, order: str) -> None:
    if order in ("stream", "drawn"):
        kind = "a stream" if order == "stream" else "a sampler of your own"
        raise ValueError(
            f"lengths= deals samples anew, and the batches of {kind} stay as they are. Leave lengths out."
        )
    if len(lengths) != len(loader.dataset):
        raise ValueError(
            f"lengths= holds {len(lengths)} numbers for {len(loader.dataset)} samples. Pass one for each."
        )


def for_evaluation(
    loader: DataLoader,
    place: Place,
    balance: bool = True,
    share: Callable[[Callable[[], list]], list] = lambda draw: draw(),
) -> Iterator[DealtBatch]:
    """
    This rank's batches of a loader, each sample on one rank and once, those that `drop_last` would leave out too.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): Of the whole data set, the same on every rank.
        place ([`Place`]): This rank.
        balance (`bool`, *optional*, defaults to `True`): Put like lengths together where they are known.
        share (`Callable`, *optional*): Takes a function that draws an order, and gives what rank 0 has drawn.
    """
    order = order_of(loader)
    if order == "stream":
        yield from _by_turns(loader, place)
        return
    if order == "drawn":
        batches = _without_repeats(as_drawn(loader, share(lambda: draw(loader))))
        yield from _load(loader, batches[place.rank :: place.world_size], place.rank)
        return
    lengths = lengths_of(loader.dataset) if balance else None
    sampler = EvaluationSampler(len(loader.dataset), place.world_size, place.rank, loader.batch_size, lengths)
    planned = PlannedDataLoader(loader.dataset, sampler, loader.collate_fn, **_options(loader, place.rank))
    for samples, inputs in zip(sampler, planned, strict=True):
        yield DealtBatch(inputs, samples)


def _load(loader: DataLoader, indices: list, rank: int) -> Iterator[DealtBatch]:
    """The batches that `indices` name, as `loader` makes them."""
    options = _options(loader, rank) | {"persistent_workers": False, "collate_fn": loader.collate_fn}
    if loader.batch_sampler is None:
        for index, inputs in zip(indices, DataLoader(loader.dataset, None, sampler=indices, **options), strict=True):
            yield DealtBatch(inputs, [(index, row) for row in range(_rows(inputs))])
        return
    for batch, inputs in zip(indices, DataLoader(loader.dataset, batch_sampler=indices, **options), strict=True):
        yield DealtBatch(inputs, batch)


def _without_repeats(order: list) -> list:
    """The same batches, each index only where it comes first."""
    seen, kept = set(), []
    for entry in order:
        batch = entry if isinstance(entry, list) else [entry]
        new = [index for index in dict.fromkeys(batch) if index not in seen]
        seen.update(new)
        if new:
            kept.append(new if isinstance(entry, list) else entry)
    return kept


def _by_turns(loader: DataLoader, place: Place) -> Iterator[DealtBatch]:
    """Every N-th batch. Samples are pairs: the batch in the order of the loader, and the row in it."""
    for turn, inputs in enumerate(loader):
        if turn % place.world_size == place.rank:
            yield DealtBatch(inputs, [(turn, row) for row in range(_rows(inputs))])


def _micro_batches(micro_steps: Sequence[MicroStep]) -> list[DealtBatch]:
    """What a rank does in the micro-steps of one optimizer step."""
    return [
        DealtBatch(inputs, samples) for step in micro_steps for inputs, samples in zip(step, step.samples, strict=True)
    ]


def _rows(inputs: Any) -> int:
    """Samples of a collated batch: the length of its first tensor or list, or of itself."""
    if isinstance(inputs, Mapping):
        return next((len(v) for v in inputs.values() if hasattr(v, "__len__") and not isinstance(v, str)), 1)
    return len(inputs[0]) if isinstance(inputs, list | tuple) and hasattr(inputs[0], "shape") else len(inputs)


def _cost(loader: DataLoader) -> RowCost:
    return RowCost(padded=not getattr(loader.collate_fn, "padding_free", False))


def _options(loader: DataLoader, rank: int) -> dict[str, Any]:
    """Return the options of a user's loader; workers without a `worker_init_fn` are seeded by rank."""
    names = (
        "num_workers",
        "pin_memory",
        "timeout",
        "multiprocessing_context",
        "prefetch_factor",
        "persistent_workers",
    )
    options = {name: getattr(loader, name) for name in names}
    return options | {"worker_init_fn": loader.worker_init_fn or worker_seeding(loader.num_workers, rank)}
