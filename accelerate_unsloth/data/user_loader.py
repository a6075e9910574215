"""
A user's DataLoader, split over the ranks: which rank gets which of its samples, and the index of each.

Batches that PyTorch forms in order or shuffled are formed again from a seed, so that an effective batch does not depend on
the number of processes. Batches of a custom sampler or a stream stay as they are and are assigned round-robin. Cost: a
stream is read on every rank, the batches of the other ranks included.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from ..launch.topology import Topology
from .lengths import lengths_of
from .loader import PlannedDataLoader, worker_seeding
from .packing import RowCost
from .sampler import EffectiveBatchSampler, EvaluationSampler

# Options of a loader that those made from it take over.
_OPTIONS = ("num_workers", "pin_memory", "timeout", "multiprocessing_context", "prefetch_factor", "persistent_workers")


@dataclass
class LocalBatch:
    """A micro-batch of this rank."""

    inputs: Any  # as the loader collates it
    samples: list  # index of each sample, or (number of the batch, row) where samples have no index


class SeededEpochs:
    """
    Epochs formed from a seed, in effective batches that do not depend on the number of processes.

    Attributes:
        facts (`dict`): What must be equal when a run continues in the middle of an epoch.
    """

    def __init__(self, loader: DataLoader, sampler: EffectiveBatchSampler):
        self._accumulation = sampler.accumulation
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
        """Draw nothing: the order follows from the seed."""

    def num_steps(self, order: None) -> int:
        """Return the optimizer steps of an epoch."""
        return self._loader.batch_sampler.num_steps

    def steps(self, epoch: int, first_step: int, order: None) -> Iterator[list[LocalBatch]]:
        """Yield this rank's micro-batches of each optimizer step from `first_step` on."""
        self._loader.batch_sampler.first_step = first_step
        self._loader.set_epoch(epoch)
        for micro_steps in _grouped(self._loader, self._accumulation):
            pairs = (zip(micro_step, micro_step.samples, strict=True) for micro_step in micro_steps)
            yield [LocalBatch(inputs, samples) for batches in pairs for inputs, samples in batches]


class RoundRobinEpochs:
    """
    Epochs whose batches stay as a sampler or a stream makes them, assigned to the ranks round-robin.

    Attributes:
        facts (`dict`): What must be equal when a run continues in the middle of an epoch.
    """

    def __init__(self, loader: DataLoader, topology: Topology, accumulation: int, order: str):
        self._given_loader, self._topology, self._accumulation = loader, topology, accumulation
        self._is_stream, self._batches_per_step = order == "stream", topology.world_size * accumulation
        self.facts = {"order of the samples": order, "micro-batches of a step": self._batches_per_step}
        if self._is_stream:
            self.facts["batch_size"] = loader.batch_size
        elif hasattr(loader.dataset, "__len__"):
            self.facts["samples"] = len(loader.dataset)

    def draw(self) -> list[list] | None:
        """Draw the order of one epoch from the sampler; the order of a stream is its own."""
        return None if self._is_stream else draw(self._given_loader)

    def num_steps(self, order: list[list] | None) -> int | None:
        """Return the optimizer steps of an epoch; nobody knows those of a stream."""
        return None if order is None else -(-len(order) // self._batches_per_step)

    def steps(self, epoch: int, first_step: int, order: list[list] | None) -> Iterator[list[LocalBatch]]:
        """Yield this rank's micro-batches of each optimizer step from `first_step` on; a stream is read again up to it."""
        rank, world_size = self._topology.rank, self._topology.world_size
        if order is None:
            batches = islice(_read(self._given_loader, self._topology), first_step * self._accumulation, None)
        else:
            own = order[first_step * self._batches_per_step :][rank::world_size]
            batches = _load(self._given_loader, own, rank)
        return _grouped(batches, self._accumulation)


Epochs = SeededEpochs | RoundRobinEpochs


def for_training(
    loader: DataLoader,
    topology: Topology,
    accumulation: int,
    seed: int,
    balance: bool = True,
    lengths: Sequence[int] | None = None,
) -> Epochs:
    """
    Return the epochs of a loader of the whole dataset, the same on every rank, as this rank takes part in them.

    A step has `accumulation` micro-batches on each rank. `seed` is for a loader that shuffles. With `balance` samples are
    assigned by `lengths`, the tokens of each; by default those of a column `input_ids`.

    Raises:
        ValueError: for a loader that cannot be split (see [`order_of`]), or lengths that do not fit it.
    """
    order = order_of(loader)
    keeps_batches = order in ("sampler", "stream")
    if lengths is not None and keeps_batches:
        kind = "a stream" if order == "stream" else "a custom sampler"
        raise ValueError(f"lengths= forms new batches, and the batches of {kind} stay as they are. Leave lengths out.")
    if lengths is not None and len(lengths) != len(loader.dataset):
        raise ValueError(
            f"lengths= holds {len(lengths)} numbers for {len(loader.dataset)} samples. Pass one for each sample."
        )
    if keeps_batches:
        return RoundRobinEpochs(loader, topology, accumulation, order)
    lengths = lengths_of(loader.dataset) if lengths is None else lengths
    sampler = EffectiveBatchSampler(
        len(loader.dataset),
        world_size=topology.world_size,
        rank=topology.rank,
        micro_batch=loader.batch_size,
        accumulation=accumulation,
        seed=seed,
        drop_last=loader.drop_last,
        strategy=order,
        lengths=lengths,
        balance=balance and lengths is not None and topology.world_size > 1,
        cost=RowCost(padded=not getattr(loader.collate_fn, "padding_free", False)),
    )
    return SeededEpochs(loader, sampler)


def for_evaluation(
    loader: DataLoader,
    topology: Topology,
    balance: bool = True,
    share: Callable[[Callable[[], list]], list] = lambda draw: draw(),
) -> Iterator[LocalBatch]:
    """
    Yield this rank's batches of a loader: each sample once and on one rank, those that `drop_last` would leave out too.

    With `balance`, similar lengths are in one batch where they are known. `share(draw)` returns on every rank what `draw()`
    returned on rank 0.
    """
    order, rank = order_of(loader), topology.rank
    if order == "stream":
        yield from _read(loader, topology)
    elif order == "sampler":
        batches = _without_repeats(share(lambda: draw(loader)))
        yield from _load(loader, batches[rank :: topology.world_size], rank)
    else:
        lengths = lengths_of(loader.dataset) if balance else None
        sampler = EvaluationSampler(len(loader.dataset), topology.world_size, rank, loader.batch_size, lengths)
        planned = PlannedDataLoader(loader.dataset, sampler, loader.collate_fn, **_options(loader, rank))
        for samples, inputs in zip(sampler, planned, strict=True):
            yield LocalBatch(inputs, samples)


def order_of(loader: DataLoader) -> str:
    """
    Return who decides the order of the samples of a loader of the whole dataset.

    Returns:
        `str`: `"sequential"` or `"random"` where PyTorch forms the batches, so that a seed can form them again; `"sampler"`
        where a custom sampler names the samples, or the dataset holds batches; `"stream"` where only reading tells.

    Raises:
        ValueError: if the loader holds one rank's part of the data, or its sampler has no length.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(f"A {type(loader).__name__} was given as a loader. Pass a torch.utils.data.DataLoader.")
    _check_whole(loader)
    has_own_iteration = type(loader).__iter__ is not DataLoader.__iter__  # whose batches only it can make
    if has_own_iteration or isinstance(loader.dataset, IterableDataset):
        return "stream"
    sampler = loader.sampler
    if loader.batch_size is not None and hasattr(loader.dataset, "__len__"):
        if type(sampler) is SequentialSampler:
            return "sequential"
        if type(sampler) is DistributedSampler:  # a part for each rank, but of an order that is known
            return "random" if sampler.shuffle else "sequential"
        if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(loader.dataset):
            return "random"
    source = sampler if loader.batch_sampler is None else loader.batch_sampler
    try:
        len(source)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(source).__name__} has no length, so the end of an epoch is unknown. Give the sampler a __len__, or "
            "read the samples from an IterableDataset."
        ) from error
    return "sampler"


def _check_whole(loader: DataLoader) -> None:
    """Raise an error if a loader holds the part of one rank."""
    sampler = loader.sampler
    if loader.batch_size is None and loader.batch_sampler is not None:  # a custom batch sampler
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    is_part = (
        isinstance(loader, DataLoaderDispatcher)
        or isinstance(loader.batch_sampler, BatchSamplerShard)
        or isinstance(loader.dataset, IterableDatasetShard)
        or getattr(loader.dataset, "_distributed", None) is not None  # datasets.distributed.split_dataset_by_node
    )
    if hasattr(sampler, "num_replicas") or hasattr(sampler, "rank"):
        known = type(sampler) is DistributedSampler and sampler is loader.sampler
        is_part = is_part or not known or len(sampler.dataset) != len(loader.dataset)
    if is_part:
        raise ValueError(
            f"This loader is already split over the ranks ({type(loader).__name__} with {type(sampler).__name__}), and "
            "MultiGPUTrainer splits it itself. Pass the loader of the whole dataset, as it was before Accelerator.prepare() "
            "and without a sampler that knows the rank."
        )


def draw(loader: DataLoader) -> list[list]:
    """Draw one epoch's batches of indices from the loader's own sampler; of one index each where the dataset holds batches."""
    batches = ([index] for index in loader.sampler) if loader.batch_sampler is None else loader.batch_sampler
    # NumPy's and PyTorch's integers become plain ones.
    return [[int(index) if hasattr(index, "__index__") else index for index in batch] for batch in batches]


def _load(loader: DataLoader, order: list[list], rank: int) -> Iterator[LocalBatch]:
    """Yield the batches of these indices, as `loader` makes them."""
    options = _options(loader, rank) | {"persistent_workers": False, "collate_fn": loader.collate_fn}
    # Where an order comes from JSON, indices that are tuples have become lists.
    batches = [[tuple(index) if isinstance(index, list) else index for index in batch] for batch in order]
    if loader.batch_sampler is None:
        indices = [index for [index] in batches]
        loaded = DataLoader(loader.dataset, batch_size=None, sampler=indices, **options)
        for index, inputs in zip(indices, loaded, strict=True):
            yield LocalBatch(inputs, [(index, row) for row in range(_rows(inputs))])
    else:
        loaded = DataLoader(loader.dataset, batch_sampler=batches, **options)
        for samples, inputs in zip(batches, loaded, strict=True):
            yield LocalBatch(inputs, samples)


def _without_repeats(order: list[list]) -> list[list]:
    """Return the same batches with each index only where it comes first."""
    seen, kept = set(), []
    for batch in order:
        new = [index for index in dict.fromkeys(batch) if index not in seen]
        seen.update(new)
        kept += [new] if new else []
    return kept


def _read(loader: DataLoader, topology: Topology) -> Iterator[LocalBatch]:
    """Read a stream and yield this rank's batches of it."""
    for number, inputs in enumerate(loader):
        if number % topology.world_size == topology.rank:
            yield LocalBatch(inputs, [(number, row) for row in range(_rows(inputs))])


def _grouped(entries: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` entries; the last one may be shorter."""
    stream = iter(entries)
    while group := list(islice(stream, size)):
        yield group


def _rows(inputs: Any) -> int:
    """Count the samples of a collated batch: the length of its first tensor or list, or of itself."""
    if isinstance(inputs, Mapping):
        return next((len(v) for v in inputs.values() if hasattr(v, "__len__") and not isinstance(v, str)), 1)
    return len(inputs[0]) if isinstance(inputs, list | tuple) and hasattr(inputs[0], "shape") else len(inputs)


def _options(loader: DataLoader, rank: int) -> dict[str, Any]:
    """Return the options of a user's loader; workers without a `worker_init_fn` are seeded by rank."""
    options = {name: getattr(loader, name) for name in _OPTIONS}
    return options | {"worker_init_fn": loader.worker_init_fn or worker_seeding(loader.num_workers, rank)}
