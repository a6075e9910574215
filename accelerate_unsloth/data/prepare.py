"""
Tokenises once per node.

TRL prepares the data on every rank, one after the other, and Unsloth on all at once. Here the first process of each node
prepares it, and all processes of the node map the files of its result. The other processes prepare a few rows, because the
preparation also sets up the trainer (its collator, its arguments).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import datasets
import pyarrow.compute as pc
from accelerate import PartialState
from datasets.formatting import query_table

from ..launch.channel import channel
from ..launch.topology import topology
from ..patches import patched
from .contents import digest_of_samples
from .loader import IGNORED
from .shared_rows import open_shared, share

_PROBE_ROWS = 8


def prepare_once(dataset, prepare: Callable, split: str):
    """
    Run `prepare(dataset)` on one process of each node, and return the result, mapped from the same files by all of a node.

    `prepare` is the trainer's own preparation, which may also change the trainer. Other types than [`~datasets.Dataset`] are
    prepared on every rank. `split` is for messages.

    Raises:
        ValueError: if the ranks were given different rows, which only those of one rank would survive.
        PeerFailure: on the waiting ranks if the preparation fails on their node's first process.
    """
    if topology().world_size == 1 or not isinstance(dataset, datasets.Dataset):
        return prepare(dataset)
    _check_same_rows(dataset, split)
    prepared = functools.cache(lambda: prepare(dataset))
    with _without_ordering():
        shared = channel().run_on_local_main(f"prepare/{split}", lambda: share(prepared()))
        like = prepared() if topology().is_local_main else _set_up_trainer(dataset, prepare)
    # Nodes that share a cache replace each other's files, so all map them when no node writes any more.
    channel().gather(f"prepared/{split}", True)
    return open_shared(shared, like)


def _check_same_rows(dataset: datasets.Dataset, split: str) -> None:
    """Raise `ValueError` on all ranks if the number or the content of their rows differs."""
    ranks_rows = channel().gather(f"rows/{split}", [len(dataset), digest_of_samples(dataset)])
    if all(rows == ranks_rows[0] for rows in ranks_rows):
        return
    lengths = [length for length, _ in ranks_rows]
    other = next(rank for rank, rows in enumerate(ranks_rows) if rows != ranks_rows[0])
    what = f"{lengths[0]} rows on rank 0 and {lengths[other]} on rank {other}"
    if lengths[0] == lengths[other]:
        what = f"other rows on rank {other} than on rank 0, {lengths[0]} on each"
    raise ValueError(
        f"The ranks were given different datasets ({split}): {what}. Give all rows on every rank: accelerate_unsloth assigns "
        "the samples of each step to ranks. Look for shard(), slices by rank, and shuffling or splitting without a seed."
    )


@contextmanager
def map_once() -> Iterator[None]:
    """
    Let each `Dataset.map` run on one process of each node.

    For trainers that prepare their data in the constructor (trl 1.15.0, `experimental/orpo` and `experimental/cpo`). Delete
    it when they have a `_prepare_dataset`.
    """
    original = datasets.Dataset.map

    def map_here(dataset, *args, **kwargs):
        with patched(datasets.Dataset, map=original):
            return prepare_once(dataset, lambda rows: original(rows, *args, **kwargs), "data")

    with patched(datasets.Dataset, map=map_here), _without_ordering():
        yield


def _set_up_trainer(dataset: datasets.Dataset, prepare: Callable):
    """Prepare a few rows, for the effects on the trainer; all rows if these few cannot be prepared alone."""
    table = query_table(dataset.data, range(min(_PROBE_ROWS, len(dataset))), indices=dataset._indices)
    # In memory, so that `map` writes no files of these rows into the cache.
    few = datasets.Dataset(table, dataset.info, dataset.split).with_format(**dataset.format)
    try:
        return prepare(few)
    except Exception:  # any other error than one of the few rows is raised again
        return prepare(dataset)


def _without_ordering() -> AbstractContextManager:
    """
    Let the preparation run on one rank alone. TRL's waits for all ranks (`main_process_first`, trl 1.15.0,
    `global_then_local_main_first`).
    """
    names = ("main_process_first", "local_main_process_first")
    return patched(PartialState, **dict.fromkeys(names, lambda state: nullcontext()))


def check_not_empty(dataset, split: str) -> None:
    """Raise `ValueError` if the dataset has no rows."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"The {split} dataset is empty. Give at least one sample.")


def check_has_labels(dataset, split: str) -> None:
    """Raise `ValueError` if preparation dropped every sample, or no label is left but those of first tokens."""
    if not isinstance(dataset, datasets.Dataset):
        return
    if len(dataset) and ("labels" not in dataset.column_names or _any_label(dataset)):
        return
    raise ValueError(
        f"No sample of the {split} dataset has a token to learn from: all labels are masked ({IGNORED}), or are first tokens. "
        "Check that texts and completions are not empty, and that max_length leaves room for them behind the prompt."
    )


def _any_label(dataset: datasets.Dataset) -> bool:
    for table in dataset.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000):
        # Nothing comes before a first token, to predict it from.
        labels = pc.list_slice(table["labels"].combine_chunks(), 1)
        if pc.any(pc.not_equal(labels.flatten(), IGNORED)).as_py():
            return True
    return False
