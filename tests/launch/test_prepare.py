"""Preparing once per node: what other processes map is what was prepared, and nothing of ours stays on the disk."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from accelerate_unsloth.data import shared_rows

from ..launching import WORKERS, launch, result

FEATURES = Features({"ids": List(Value("int32")), "kind": ClassLabel(names=["a", "b"]), "text": Value("string")})


def stored(folder: Path) -> Dataset:
    """Ten rows in a file, as a builder of `datasets` leaves them."""
    rows = {"ids": [[n] * n for n in range(10)], "kind": [n % 2 for n in range(10)], "text": list("abcdefghij")}
    Dataset.from_dict(rows, FEATURES).save_to_disk(folder / "stored")
    return datasets.load_from_disk(folder / "stored")


def even(row):
    return len(row["ids"]) % 2 == 0


def longer(row):
    return {"ids": [*row["ids"], 7]}


# How a dataset whose rows lie in files may have been made of the stored one.
MAPPED = {
    "as it is": lambda rows: rows,
    "mapped": lambda rows: rows.map(longer),
    "mapped by two processes": lambda rows: rows.map(longer, num_proc=2),
    "filtered": lambda rows: rows.map(longer).filter(even),
    "filtered by two processes": lambda rows: rows.filter(even, num_proc=2),
    "shuffled": lambda rows: rows.shuffle(seed=3),
    "sliced": lambda rows: rows.select(np.arange(3, 8)),
    "sliced twice": lambda rows: rows.map(longer, num_proc=2).skip(2).take(5),
    "renamed": lambda rows: rows.map(longer, num_proc=2).rename_column("kind", "label"),
    "other columns": lambda rows: rows.select_columns(["kind", "ids"]).remove_columns("ids"),
    "side by side": lambda rows: datasets.concatenate_datasets(
        [rows.remove_columns("text"), rows.select_columns("text")], axis=1
    ),
    "one after the other": lambda rows: datasets.concatenate_datasets([rows, rows.map(longer)]),
    "formatted": lambda rows: rows.with_format("numpy", columns=["ids"]),
    "transformed": lambda rows: rows.with_transform(lambda batch: {"text": [text * 2 for text in batch["text"]]}),
}
# And one with rows or their order in memory.
WRITTEN = {
    "in memory": lambda rows: Dataset.from_dict(rows.to_dict(), FEATURES),
    "a column in memory": lambda rows: rows.add_column("more", list(range(10))),
    "an order in memory": lambda rows: rows.select([3, 1, 2]),
    "cast": lambda rows: Dataset(rows.data.cast(Features(FEATURES | {"ids": List(Value("int64"))}).arrow_schema)),
    "transformed, in memory": lambda rows: MAPPED["transformed"](WRITTEN["in memory"](rows)),
}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.mark.parametrize("made", MAPPED | WRITTEN)
def test_another_process_opens_what_was_prepared(made, temporary, tmp_path):
    prepared = (MAPPED | WRITTEN)[made](stored(tmp_path))
    before = {*tmp_path.rglob("*")}
    message = json.loads(json.dumps(shared_rows.share(prepared)))
    assert (len({*tmp_path.rglob("*")} - before) > 0) == (made in WRITTEN)
    opened = shared_rows.open_shared(message, like=prepared)
    assert opened.cache_files
    assert repr(opened[:]) == repr(prepared[:])
    assert opened.with_format(None)[:] == prepared.with_format(None)[:]
    assert opened.features == prepared.features
    assert opened.format == prepared.format
    assert opened._fingerprint == prepared._fingerprint


def test_rows_whose_file_is_gone_are_written_anew(temporary, tmp_path):
    prepared = stored(tmp_path)
    os.remove(prepared.cache_files[0]["filename"])
    assert shared_rows.open_shared(shared_rows.share(prepared), like=prepared)[:] == prepared[:]


def folder_of(owner: int | str, temporary: Path) -> Path:
    folder = temporary / f"accelerate_unsloth-{socket.gethostname()}-{owner}-abc"
    folder.mkdir()
    return folder


def test_folders_of_processes_that_were_killed_are_removed(temporary, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = folder_of(ended.pid, temporary), folder_of(os.getppid(), temporary)
    of_other_host = folder_of(f"with-a-longer-name-{ended.pid}", temporary)
    shared_rows.share(WRITTEN["in memory"](stored(tmp_path)))
    assert not dead.exists()
    assert living.exists()
    assert of_other_host.exists()


@pytest.mark.launch
def test_rows_in_memory_are_shared_by_files_that_end_with_the_launch(tiny_model, uneven_data, tmp_path):
    losses = {}
    for processes, accumulation in ((1, 4), (2, 2)):
        folder, temporary = tmp_path / str(processes), tmp_path / f"temporary{processes}"
        folder.mkdir()
        temporary.mkdir()
        options = {"args": {"gradient_accumulation_steps": accumulation}, "in_memory": True}
        finished = launch(
            WORKERS / "train.py",
            [tiny_model, uneven_data, folder, json.dumps(options)],
            processes,
            environment={"HF_HOME": str(folder / "cache"), "TMPDIR": str(temporary)},
        )
        assert finished.status == 0, finished.output[-4000:]
        losses[processes] = result(folder)["losses"]
        written = result(folder, rank=processes - 1)["data_files"]
        assert [Path(file).parents[1] for file in written] == ([temporary] if processes == 2 else [])
        assert [file for file in temporary.rglob("*") if file.is_file()] == []
        assert [file.name for file in (folder / "cache").rglob("*.arrow")] == ["json-train.arrow"]  # as it was loaded
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert max(result(tmp_path / "2", rank=1)["mapped_rows"]) <= 8
