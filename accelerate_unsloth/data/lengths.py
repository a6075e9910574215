"""
Tokens of each sample, counted once: from the offsets of the Arrow columns, without looking at a single token.

The process that tokenises writes them beside the data set, and the others of its node map that file.
"""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc

_COLUMN = "input_ids"


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
