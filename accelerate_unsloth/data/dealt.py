"""A user's own DataLoader, dealt over the ranks: who gets which of its samples, and what they were."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from .balance import RowCost
from .lengths import lengths_of
from .loader import PlannedDataLoader, Slot
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


def order_of(loader: DataLoader) -> str | None:
    """
    In what order a DataLoader visits its samples: `"sequential"`, `"random"`, or `None` if that is the loader's secret.

    Only batches that PyTorch forms by itself from a data set with a length and random access can be formed anew.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from accelerate_unsloth.data.dealt import order_of
    >>> order_of(DataLoader([1, 2, 3], batch_size=2, shuffle=True))
    'random'
    ```
    """
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return None
    if loader.batch_size is None:  # the batches of a batch sampler of one's own, or no batches at all
        return None
    sampler = loader.sampler
    if type(sampler) is SequentialSampler:
        return "sequential"
    whole = type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(loader.dataset)
    return "random" if whole else None


def for_training(
    loader: DataLoader,
    place: Place,
    accumulation: int,
    seed: int,
    balance: bool = True,
    lengths: Sequence[int] | None = None,
) -> PlannedDataLoader | None:
    """
    The same samples in effective batches that do not depend on the number of processes.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): Of the whole data set, the same on every rank.
        place ([`Place`]): This rank.
        accumulation (`int`): Micro-batches of an optimizer step on each rank.
        seed (`int`): Of the order, if the loader shuffles.
        balance (`bool`, *optional*, defaults to `True`): Deal by tokens where lengths are known.
        lengths (`Sequence[int]`, *optional*): Tokens of each sample; by default those of a column `input_ids`.

    Returns:
        [`PlannedDataLoader`], or `None` for a loader whose samples cannot be dealt; see [`order_of`].
    """
    order = order_of(loader)
    if order is None:
        return None
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
    return PlannedDataLoader(loader.dataset, sampler, loader.collate_fn, **_options(loader))


def for_evaluation(loader: DataLoader, place: Place, balance: bool = True) -> Iterator[DealtBatch]:
    """This rank's batches of a loader, each sample on one rank; of any loader, as long as it is the same on all ranks."""
    if order_of(loader) is None:
        yield from by_turns(loader, place)
        return
    lengths = lengths_of(loader.dataset) if balance else None
    sampler = EvaluationSampler(len(loader.dataset), place.world_size, place.rank, loader.batch_size, lengths)
    planned = PlannedDataLoader(loader.dataset, sampler, loader.collate_fn, **_options(loader))
    for samples, inputs in islice(zip(sampler, planned, strict=True), sampler.num_real):
        yield DealtBatch(inputs, samples)


def by_turns(loader, place: Place) -> Iterator[DealtBatch]:
    """
    Every N-th batch of a loader that gives the same batches on every rank; all of them if it is dealt already.

    The places of the samples are pairs: of the batch in the order of the loader, and of the sample in it.
    """
    already = isinstance(getattr(loader, "sampler", None), DistributedSampler)
    for turn, inputs in enumerate(loader):
        owner = place.rank if already else turn % place.world_size
        if owner == place.rank:
            number = turn * place.world_size + place.rank if already else turn
            yield DealtBatch(inputs, [(number, row) for row in range(_rows(inputs))])


def micro_batches(slots: Sequence[Slot]) -> list[DealtBatch]:
    """What a rank does in the micro-steps of one optimizer step."""
    return [DealtBatch(inputs, samples) for slot in slots for inputs, samples in zip(slot, slot.samples, strict=True)]


def _rows(inputs: Any) -> int:
    """Samples of a collated batch: the length of its first tensor, or of itself."""
    if isinstance(inputs, Mapping):
        return len(next(iter(inputs.values())))
    return len(inputs[0]) if isinstance(inputs, list | tuple) and hasattr(inputs[0], "shape") else len(inputs)


def _cost(loader: DataLoader) -> RowCost:
    return RowCost(padded=not getattr(loader.collate_fn, "padding_free", False))


def _options(loader: DataLoader) -> dict[str, Any]:
    names = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    return {name: getattr(loader, name) for name in (*names, "persistent_workers")}
