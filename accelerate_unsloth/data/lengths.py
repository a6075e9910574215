"""Count the tokens of each sample from the offsets of Arrow columns, which takes 0.1 s per million samples."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .loader import IGNORED

# If rows are packed from several documents, TRL keeps the lengths of these in a column (trl 1.15.0, data_utils.py).
_DOCUMENTS = "seq_lengths"


def lengths_of(dataset, column: str = "input_ids") -> np.ndarray | None:
    """Return the tokens of each sample as int32, or `None` if this is not a [`~datasets.Dataset`] with that column."""
    if not isinstance(dataset, datasets.Dataset) or column not in dataset.column_names:
        return None
    return _in_order(dataset, pc.list_value_length(dataset.data.column(column))).to_numpy().astype(np.int32)


def count_different(dataset, lengths: np.ndarray | None) -> int:
    """
    Count the different lengths that attention runs on: of documents, if rows are packed from several; else of rows.

    `lengths` are the tokens of each row of `dataset`. The count is 0 if they are not known.
    """
    if lengths is None:
        return 0
    if _DOCUMENTS not in getattr(dataset, "column_names", ()):
        return len(np.unique(lengths))
    return len(pc.unique(pc.list_flatten(_in_order(dataset, dataset.data.column(_DOCUMENTS)))))


def lacks_labels(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Return for each sample whether no label of a causal language model is left behind the masked ones, as bool."""
    found = []
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        labels = table[column].combine_chunks()
        lengths = pc.list_value_length(labels).to_numpy()
        last = labels.flatten().to_numpy()[np.cumsum(lengths) - 1]
        found.append((last == IGNORED) | (lengths < 2))  # the first label is no target
    return np.concatenate(found)


def _in_order(dataset: datasets.Dataset, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of stored rows in the order of the dataset, without rows that it leaves out."""
    return values if dataset._indices is None else values.take(dataset._indices.column(0))
