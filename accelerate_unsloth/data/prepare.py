"""
Tokenise once a node.

TRL's preparation runs on every rank, one after the other, and Unsloth's on all at once. Here the first process of each
node runs it and writes the result, with the length of each sample, to the datasets cache; all processes of the node map
that file. The others run the preparation on a few rows, because it also sets up the trainer (its collator, its
arguments).
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
import pyarrow.compute as pc
from accelerate import PartialState

from ..channel import channel
from ..ledger import Ledger
from ..topology import topology
from .lengths import write_lengths
from .loader import IGNORED

_PROBE_ROWS = 8


def prepare_once(dataset, prepare: Callable, split: str):
    """
    Run `prepare(dataset)` on one process of each node.

    Args:
        dataset ([`~datasets.Dataset`]): What to prepare; anything else is prepared on every rank.
        prepare (`Callable`): The trainer's own preparation, which may also change the trainer.
        split (`str`): Name of the split, for messages.

    Returns:
        The prepared data set, the same file on all processes of a node.

    Raises:
        PeerFailure: on the waiting ranks if the preparation fails on their node's first process.
    """
    if topology().world_size == 1 or not isinstance(dataset, datasets.Dataset):
        return prepare(dataset)
    with _without_ordering():
        folder = channel().run_on_local_main(f"prepare/{split}", lambda: str(_write(prepare(dataset))))
        if not topology().is_local_main:
            _set_up_trainer(dataset, prepare)
    return datasets.load_from_disk(folder)


def _set_up_trainer(dataset, prepare: Callable) -> None:
    """For its effects on the trainer only, on a few rows; on all where these few cannot be prepared on their own."""
    try:
        prepare(dataset.select(range(min(_PROBE_ROWS, len(dataset)))))
    except Exception:  # whatever it is, the whole data set has just been prepared on another process
        prepare(dataset)


@contextmanager
def _without_ordering():
    """
    Let the preparation run on one rank alone: TRL's waits for all ranks in it (`main_process_first`, trl 1.15.0,
    `global_then_local_main_first`).
    """
    patches = Ledger()
    for name in ("main_process_first", "local_main_process_first"):
        patches.patch(PartialState, name, lambda state: nullcontext())
    try:
        yield
    finally:
        patches.undo()


def _write(prepared: datasets.Dataset) -> Path:
    """Write to the cache under the fingerprint; complete or absent, also where nodes share the folder."""
    # A digest of it, because one that was read from a disk may be any text, such as a path.
    name = hashlib.sha256(prepared._fingerprint.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "accelerate_unsloth" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}")
    prepared.save_to_disk(str(beside))
    write_lengths(prepared, beside)
    try:
        os.rename(beside, folder)
    except OSError:  # another node was first
        shutil.rmtree(beside)
    return folder


def check_not_empty(dataset, split: str) -> None:
    """
    Raises:
        ValueError: if the data set has no rows.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"The {split} data set is empty. Give at least one sample.")


def check_has_labels(dataset, split: str) -> None:
    """
    Make sure that there is something to learn.

    Raises:
        ValueError: if preparation dropped every sample, or every label is masked.
    """
    if not isinstance(dataset, datasets.Dataset):
        return
    if len(dataset) and ("labels" not in dataset.column_names or _any_label(dataset)):
        return
    raise ValueError(
        f"No sample of the {split} data set has a token to learn from: all labels are masked ({IGNORED}). Check that "
        "completions are not empty, and that max_length leaves room for them behind the prompt."
    )


def _any_label(dataset: datasets.Dataset) -> bool:
    for table in dataset.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000):
        if pc.any(pc.not_equal(table["labels"].combine_chunks().flatten(), IGNORED)).as_py():
            return True
    return False
