"""
Tokens of each sample, counted once: from the offsets of the Arrow columns, without looking at a single token.

The process that tokenises writes them beside the data set, and the others of its node map that file.
"""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc

_COLUMN = "input_ids"

# Where rows are packed from several documents, TRL keeps the lengths of these in a column (trl 1.15.0, data_utils.py).
_DOCUMENTS = "seq_lengths"


def count_lengths(dataset: datasets.Dataset) -> np.ndarray | None:
    """
    Tokens of each sample.

    Args:
        dataset ([`~datasets.Dataset`]): A tokenised data set.

    Returns:
        `np.ndarray` of int32 with shape `(num_samples,)`, or `None` if there is no `input_ids`.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from accelerate_unsloth.data.lengths import count_lengths
    >>> count_lengths(Dataset.from_dict({"input_ids": [[1, 2], [3]]})).tolist()
    [2, 1]
    ```
    """
    if _COLUMN not in dataset.column_names:
        return None
    tables = dataset.select_columns([_COLUMN]).with_format("arrow").iter(batch_size=10_000)
    counts = [pc.list_value_length(table[_COLUMN]).to_numpy() for table in tables]
    return np.concatenate(counts).astype(np.int32) if counts else np.zeros(0, dtype=np.int32)


def count_different(dataset, lengths: np.ndarray | None) -> int:
    """
    Number of different lengths that attention runs on: those of documents, where rows are packed from several.

    Args:
        dataset ([`~datasets.Dataset`]): The data set that `lengths` are of.
        lengths (`np.ndarray`, *optional*): Tokens of each of its rows.

    Returns:
        `int`: 0 if they are not known.

    Example:

    ```python
    >>> import numpy as np
    >>> from datasets import Dataset
    >>> from accelerate_unsloth.data.lengths import count_different
    >>> packed = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]], "seq_lengths": [[1, 2], [3]]})
    >>> count_different(packed, np.array([3, 3]))
    3
    ```
    """
    if lengths is None:
        return 0
    if _DOCUMENTS not in getattr(dataset, "column_names", ()):
        return len(np.unique(lengths))
    tables = dataset.select_columns([_DOCUMENTS]).with_format("arrow").iter(batch_size=10_000)
    return len(set().union(*(pc.unique(pc.list_flatten(table[_DOCUMENTS])).to_pylist() for table in tables)))


def write_lengths(dataset: datasets.Dataset, folder: Path) -> None:
    """Write the tokens of each sample to the folder that `dataset` was saved to."""
    lengths = count_lengths(dataset)
    if lengths is not None:
        np.save(_beside(min(folder.glob("*.arrow"))), lengths, allow_pickle=False)


def _beside(data_file: Path) -> Path:
    """Named after the first data file, because `map` writes its results into the same folder."""
    return data_file.with_name(f"{data_file.name}.lengths.npy")


def lengths_of(dataset) -> np.ndarray | None:
    """Tokens of each sample, from the file beside the data set where it has one; `None` where they are not known."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    if dataset.cache_files and dataset._indices is None:
        file = _beside(Path(dataset.cache_files[0]["filename"]))
        if file.is_file():
            lengths = np.load(file, mmap_mode="r", allow_pickle=False)
            if len(lengths) == len(dataset):
                return lengths
    return count_lengths(dataset)
