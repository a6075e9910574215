"""
Digests of what datasets hold, taken without running a user's code.

A transform or a custom `__getitem__` may be slow, draw random numbers, or give each rank something else from equal data.
So only containers are read whose reading has no effects: Arrow tables, lists, tensors, and what PyTorch composes of them.
Each compared sample is read once, from memory or an Arrow file. Of other datasets the content is not compared.
"""

import hashlib
import os
from bisect import bisect_right
from collections import UserDict
from collections.abc import Collection
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
import torch
from datasets.formatting import query_table
from torch.utils.data import ConcatDataset, Subset, TensorDataset

# Of each dataset so many samples are compared, spread evenly.
_SAMPLES_COMPARED = 64

# By their exact type, because a subclass may have a `__getitem__` of a user.
_PLAIN_CONTAINERS = (list, tuple, range, torch.Tensor, np.ndarray)


def digest_of_samples(rows, columns: Collection[str] | None = None) -> str | None:
    """
    Return a digest of up to 64 samples, spread evenly.

    Args:
        rows: A dataset with a length.
        columns (`Collection[str]`, *optional*): Names of the columns to compare, by default all.

    Returns:
        `str`: the digest, or `None` for a dataset that only a user's code can read.

    Example:

    ```python
    >>> from accelerate_unsloth.data.contents import digest_of_samples
    >>> digest_of_samples([{"text": "a"}]) == digest_of_samples([{"text": "b"}])
    False
    ```
    """
    last = len(rows) - 1
    places = {place * last // (_SAMPLES_COMPARED - 1) for place in range(_SAMPLES_COMPARED)} if last >= 0 else ()
    samples = _read(rows, sorted(places), columns)
    return None if samples is None else _digest(repr(_contents(samples)).encode())


def _read(rows, places: list[int], columns: Collection[str] | None) -> list | None:
    """Return the samples at `places`, or `None` if reading them runs a user's code."""
    kind = type(rows)
    if kind is datasets.Dataset:  # below its format, and so below a transform
        table = query_table(rows.data, places, indices=rows._indices).combine_chunks()
        return [{name: table[name].to_numpy() for name in table.column_names if columns is None or name in columns}]
    if kind in _PLAIN_CONTAINERS:
        return [_selected(rows[place], columns) for place in places]
    if kind is TensorDataset:
        return [[tensor[place] for tensor in rows.tensors] for place in places]
    if kind is Subset:
        return _read(rows.dataset, [int(rows.indices[place]) for place in places], columns)
    if kind is ConcatDataset:
        parts = [_read(*_within(rows, place), columns) for place in places]
        return None if any(part is None for part in parts) else parts
    return None


def _within(rows: ConcatDataset, place: int) -> tuple[Any, list[int]]:
    """Return the dataset that holds the sample at `place`, and its place there."""
    part = bisect_right(rows.cumulative_sizes, place)
    return rows.datasets[part], [place - rows.cumulative_sizes[part - 1] if part else place]


def _selected(sample: Any, columns: Collection[str] | None) -> Any:
    if columns is None or not isinstance(sample, dict):
        return sample
    return {name: value for name, value in sample.items() if name in columns}


def _contents(value: Any) -> Any:
    """Return what a sample holds as plain values; of absolute paths only the last part, of unknown objects the type."""
    if isinstance(value, dict | UserDict):
        return sorted(((str(name), _contents(inner)) for name, inner in value.items()), key=itemgetter(0))
    if isinstance(value, list | tuple):
        return [_contents(inner) for inner in value]
    if isinstance(value, str):  # machines may keep the same file in different folders
        return os.path.basename(value) if os.path.isabs(value) else value
    if isinstance(value, bytes):
        return _digest(value)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        copied = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return [str(value.dtype), list(value.shape), _digest(copied.view(-1).view(torch.uint8).numpy())]
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            return _contents(value.tolist())
        return [str(value.dtype), list(value.shape), _digest(value.tobytes())]
    return value if isinstance(value, int | float | None) else type(value).__name__


def _digest(data) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
