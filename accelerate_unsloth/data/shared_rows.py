"""
Shares a dataset of one process with the other processes of its node, through files.

`map` and `filter` leave their results in files of the `datasets` cache, and the other processes map the same files. Only rows
in memory are written, to a temporary folder. It is removed when the process ends, or by the next launch if the process was
killed. Cost: one copy of rows in memory, for the time of the launch.
"""

import atexit
import json
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import datasets
import psutil
from datasets.table import MemoryMappedTable, Table, concat_tables

# Operations of `datasets` on a mapped table that are repeated when it is mapped again (datasets 4.8, table.py), as far as JSON
# can hold their arguments. The metadata are made from the features.
_REPLAYED = {"slice", "select", "drop", "rename_columns"}
_DERIVED = "replace_schema_metadata"


def share(dataset: datasets.Dataset) -> dict[str, Any]:
    """Write rows that are in memory, and return in which files all rows are: JSON-serialisable, for [`open_shared`]."""
    mapped = _is_mapped(dataset.data) and (dataset._indices is None or _is_mapped(dataset._indices))
    stored = dataset if mapped else _written(dataset)
    return {
        "rows": _blocks(stored.data),
        "indices": None if stored._indices is None else _blocks(stored._indices),
        "features": dataset.features.to_dict(),
        "fingerprint": dataset._fingerprint,
    }


def open_shared(shared: dict[str, Any], like: datasets.Dataset) -> datasets.Dataset:
    """
    Map the files of a dataset that another process of this node has shared, by what [`share`] returned there.

    `like` is a dataset of the same format, with any rows.
    """
    info = like.info.copy()
    info.features = datasets.Features.from_dict(shared["features"])
    indices = None if shared["indices"] is None else _table(shared["indices"])
    opened = datasets.Dataset(_table(shared["rows"]), info, like.split, indices).with_format(**like.format)
    # The same on all ranks, so that `map` finds the same files in its cache.
    opened._fingerprint = shared["fingerprint"]
    return opened


def _parts(table: Table) -> list[list[Table]]:
    """Return the tables that `table` consists of: rows of tables side by side."""
    return getattr(table, "blocks", [[table]])


def _is_mapped(table: Table) -> bool:
    return all(
        isinstance(part, MemoryMappedTable)
        and os.path.exists(part.path)
        and {name for name, _, _ in part.replays} <= {*_REPLAYED, _DERIVED}
        for row in _parts(table)
        for part in row
    )


def _blocks(table: Table) -> list[list]:
    blocks = [
        [(part.path, [replay for replay in part.replays if replay[0] in _REPLAYED]) for part in row]
        for row in _parts(table)
    ]
    return json.loads(json.dumps(blocks, default=int))  # a slice may begin at a NumPy integer


def _table(blocks: list[list]) -> Table:
    rows = [[MemoryMappedTable.from_file(path, replays) for path, replays in row] for row in blocks]
    return concat_tables([concat_tables(row, axis=1) for row in rows])


def _written(dataset: datasets.Dataset) -> datasets.Dataset:
    """Write a dataset to a temporary folder, and return it mapped from there."""
    prefix = f"accelerate_unsloth-{socket.gethostname()}-"
    _remove_leftovers(prefix)
    folder = tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-")
    atexit.register(_remove, folder, os.getpid())
    dataset.with_format(None).save_to_disk(folder)
    return datasets.load_from_disk(folder, keep_in_memory=False)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(prefix: str) -> None:
    """Remove the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        owner = re.fullmatch(r"(\d+)-[^-]+", folder.name.removeprefix(prefix))
        if owner and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)
