"""
Digests of the contents of datasets, taken without running a user's code.

A transform or a custom `__getitem__` may be slow, draw random numbers, or return something else on each rank from equal
data. So only Arrow tables, lists, tensors, and what PyTorch composes of them are read. Cost: 64 samples, read once.
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

_SAMPLES_COMPARED = 64

# By their exact type, because a subclass may have a custom `__getitem__`.
_PLAIN_CONTAINERS = (list, tuple, range, torch.Tensor, np.ndarray)


def digest_of_samples(rows, columns: Collection[str] | None = None) -> str | None:
    """
    Return a digest of up to 64 samples, spread evenly, or `None` for a dataset that only a user's code can read.

    Only `columns` are read, by default all.
    """
    last = len(rows) - 1
    indices = {number * last // (_SAMPLES_COMPARED - 1) for number in range(_SAMPLES_COMPARED)} if last >= 0 else ()
    samples = _read(rows, sorted(indices), columns)
    return None if samples is None else _digest(repr(_contents(samples)).encode())


def _read(rows, indices: list[int], columns: Collection[str] | None) -> list | None:
    """Return the samples of these indices, or `None` if reading them runs a user's code."""
    kind = type(rows)
    if kind is datasets.Dataset:  # the stored values, without the format and so without a transform
        table = query_table(rows.data, indices, indices=rows._indices).combine_chunks()
        return [{name: table[name].to_numpy() for name in table.column_names if columns is None or name in columns}]
    if kind in _PLAIN_CONTAINERS:
        return [_selected(rows[index], columns) for index in indices]
    if kind is TensorDataset:
        return [[tensor[index] for tensor in rows.tensors] for index in indices]
    if kind is Subset:
        return _read(rows.dataset, [int(rows.indices[index]) for index in indices], columns)
    if kind is ConcatDataset:
        parts, starts = [bisect_right(rows.cumulative_sizes, index) for index in indices], [0, *rows.cumulative_sizes]
        samples = [
            _read(rows.datasets[part], [index - starts[part]], columns)
            for part, index in zip(parts, indices, strict=True)
        ]
        return None if any(sample is None for sample in samples) else samples
    return None


def _selected(sample: Any, columns: Collection[str] | None) -> Any:
    if columns is None or not isinstance(sample, dict):
        return sample
    return {name: value for name, value in sample.items() if name in columns}


def _contents(value: Any) -> Any:
    """Return a sample as plain values; of absolute paths only the last part, of unknown objects the type."""
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
