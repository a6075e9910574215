"""In what order a user's DataLoader visits its samples, and whether that order can be made anew from a seed."""

from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)


def order_of(loader: DataLoader) -> str:
    """
    Who knows the order of a loader's samples.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): Of the whole data set.

    Returns:
        `str`: `"sequential"` or `"random"` where PyTorch forms the batches by itself, so that they can be formed anew from
        a seed; `"drawn"` where a sampler of one's own names the samples, or a data set the batches; `"stream"` where only
        reading tells.

    Raises:
        ValueError: if the loader holds one rank's part of the data, or its sampler has no length.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from accelerate_unsloth.data.loader_order import order_of
    >>> order_of(DataLoader([1, 2, 3], batch_size=2, shuffle=True))
    'random'
    ```
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(f"A {type(loader).__name__} was given as a loader. Pass a torch.utils.data.DataLoader.")
    _refuse_parts(loader)
    own_iteration = type(loader).__iter__ is not DataLoader.__iter__  # whose batches only it can make
    if own_iteration or isinstance(loader.dataset, IterableDataset):
        return "stream"
    sampler = loader.sampler
    if loader.batch_size is not None and hasattr(loader.dataset, "__len__"):
        if type(sampler) is SequentialSampler:
            return "sequential"
        if type(sampler) is DistributedSampler:  # a part for each rank, but of an order that is known
            return "random" if sampler.shuffle else "sequential"
        if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(loader.dataset):
            return "random"
    _require_length(index_source(loader))
    return "drawn"


def index_source(loader: DataLoader) -> Any:
    """What names the samples: batches of indices, or single ones where the data set holds batches."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def draw(loader: DataLoader) -> list:
    """
    One epoch's indices, as the loader's own sampler draws them this time.

    Returns:
        `list`: of lists of indices, or of indices where the data set holds batches; JSON-serialisable.
    """
    single = loader.batch_sampler is None
    return [_plain(entry) if single else [_plain(index) for index in entry] for entry in index_source(loader)]


def as_drawn(loader: DataLoader, order: list) -> list:
    """An order that came as JSON, with the indices that are tuples as such again."""
    if loader.batch_sampler is None:
        return [_index(entry) for entry in order]
    return [[_index(index) for index in batch] for batch in order]


def _index(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(index: Any) -> Any:
    """Samplers name samples by NumPy's and PyTorch's integers too."""
    return int(index) if hasattr(index, "__index__") else index


def _refuse_parts(loader: DataLoader) -> None:
    sampler = loader.sampler
    if loader.batch_size is None and loader.batch_sampler is not None:  # a batch sampler of one's own
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    part = (
        isinstance(loader, DataLoaderDispatcher)
        or isinstance(loader.batch_sampler, BatchSamplerShard)
        or isinstance(loader.dataset, IterableDatasetShard)
        or getattr(loader.dataset, "_distributed", None) is not None  # datasets.distributed.split_dataset_by_node
    )
    if hasattr(sampler, "num_replicas") or hasattr(sampler, "rank"):
        whole = type(sampler) is DistributedSampler and sampler is loader.sampler
        part = part or not whole or len(sampler.dataset) != len(loader.dataset)
    if part:
        raise ValueError(
            f"This loader is dealt over the ranks already ({type(loader).__name__} with {type(sampler).__name__}), and "
            "MultiGPUTrainer deals by itself. Pass the loader of the whole data set, as it was before Accelerator.prepare() "
            "and without a sampler that knows of ranks."
        )


def _require_length(source: Any) -> None:
    try:
        len(source)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(source).__name__} tells no length, so nobody knows where an epoch ends. Give the sampler a __len__, or "
            "read the samples from an IterableDataset."
        ) from error
