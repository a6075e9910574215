"""Checkpoints on disk: what is complete, what is damaged, and what may be deleted."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from accelerate_unsloth.launch.channel import PeerFailure
from accelerate_unsloth.reliability import checkpoints


def write_checkpoint(run_folder, step, run="ours"):
    written = run_folder / checkpoints.STAGING / f"checkpoint-{step}"
    (written / "inner").mkdir(parents=True)
    (written / "model.safetensors").write_bytes(b"weights" * step)
    (written / "inner" / "state.json").write_text(str(step))
    checkpoints.write_facts(written, {"run": run})
    checkpoints.publish(written, run_folder / f"checkpoint-{step}")
    return run_folder / f"checkpoint-{step}"


def write_stock_checkpoint(run_folder, step, weights="adapter_model.safetensors"):
    """What the Trainer writes, as far as it is looked at."""
    written = run_folder / f"checkpoint-{step}"
    (written / weights).parent.mkdir(parents=True)
    save_file({"weight": np.ones(1000)}, written / weights)
    (written / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return written


@pytest.fixture
def run_folder(tmp_path):
    """A run with the checkpoints 2, 4 and 10."""
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step)
    return tmp_path


def truncate(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"weig")


def flip(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[3] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def lose_file(checkpoint):
    (checkpoint / "inner" / "state.json").unlink()


def lose_manifest(checkpoint):
    (checkpoint / checkpoints.MANIFEST).unlink()


def break_manifest(checkpoint):
    (checkpoint / checkpoints.MANIFEST).write_text("{")


DAMAGES = {
    truncate: "model.safetensors has 4 bytes instead of 70",
    flip: "model.safetensors has another checksum than when it was saved",
    lose_file: "state.json is missing",
    lose_manifest: "has no manifest.json",
    break_manifest: "manifest.json cannot be read",
}


def test_the_newest_is_the_one_of_the_highest_step(run_folder):
    assert checkpoints.newest_complete(run_folder) == (run_folder / "checkpoint-10", [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_skipped(damage, run_folder):
    damage(run_folder / "checkpoint-10")
    found, skipped = checkpoints.newest_complete(run_folder)
    assert found == run_folder / "checkpoint-4"
    assert len(skipped) == 1
    assert "checkpoint-10 is skipped" in skipped[0]
    assert DAMAGES[damage] in skipped[0]


def test_what_was_not_published_is_invisible(run_folder):
    (run_folder / checkpoints.STAGING / "checkpoint-12").mkdir(parents=True, exist_ok=True)
    assert checkpoints.newest_complete(run_folder)[0] == run_folder / "checkpoint-10"


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoints.newest_complete(tmp_path) == (None, [])
    assert checkpoints.newest_complete(tmp_path / "absent") == (None, [])


def names(run_folder):
    return sorted(path.name for path in run_folder.glob("*checkpoint-*"))


def test_rotation_deletes_the_oldest_and_leaves_nothing_behind(run_folder):
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-10"}, "ours")
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]


def test_rotation_keeps_the_one_just_published_though_an_earlier_run_left_a_higher_step(run_folder):
    write_checkpoint(run_folder, 6)
    checkpoints.rotate(run_folder, 1, {run_folder / "checkpoint-6"}, "ours")
    assert names(run_folder) == ["checkpoint-6"]


def test_rotation_keeps_the_best_however_its_path_is_written(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    checkpoints.rotate(run_folder, 1, {run_folder / "checkpoint-10", Path("checkpoint-2")}, "ours")
    assert names(run_folder) == ["checkpoint-10", "checkpoint-2"]


def test_what_a_dying_process_left_half_deleted_is_cleared(run_folder):
    (run_folder / ".deleted-checkpoint-2" / "inner").mkdir(parents=True)
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-10"}, "ours")
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_deleted(run_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "checkpoint-2"
    (run_folder / "checkpoint-2").rename(elsewhere)
    (run_folder / "checkpoint-2").symlink_to(elsewhere)
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-10"}, "ours")
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]
    assert checkpoints.damage(elsewhere) is None


def test_rotation_neither_counts_nor_deletes_what_another_run_wrote(run_folder):
    write_checkpoint(run_folder, 12, run="theirs")
    write_stock_checkpoint(run_folder, 14)
    (run_folder / "checkpoint-best").mkdir()
    write_checkpoint(run_folder, 16)
    (run_folder / "checkpoint-2" / checkpoints.FACTS).write_text("{")  # nobody can tell whose it is
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-16"}, "ours")
    assert names(run_folder) == [f"checkpoint-{name}" for name in (10, 12, 14, 16, 2, "best")]


def test_without_a_limit_nothing_is_deleted(run_folder):
    checkpoints.rotate(run_folder, None, set(), "ours")
    assert len(names(run_folder)) == 3


def test_publishing_a_step_again_replaces_it(run_folder):
    written = run_folder / checkpoints.STAGING / "checkpoint-10"
    written.mkdir(parents=True, exist_ok=True)
    (written / "model.safetensors").write_bytes(b"other")
    checkpoints.publish(written, run_folder / "checkpoint-10")
    assert checkpoints.damage(run_folder / "checkpoint-10") is None
    assert (run_folder / "checkpoint-10" / "model.safetensors").read_bytes() == b"other"


def test_only_a_free_or_empty_place_or_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / checkpoints.MANIFEST).touch()
    allowed = {name: checkpoints.may_replace(tmp_path / name) for name in ("free", "empty", "thesis", "checkpoint")}
    assert allowed == {"free": True, "empty": True, "thesis": False, "checkpoint": True}


def test_what_lacks_a_required_file_is_not_published(run_folder):
    written = run_folder / checkpoints.STAGING / "checkpoint-10"
    written.mkdir(parents=True, exist_ok=True)
    (written / "rng_state_0.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-10 is not published: model.safetensors, rng_state_1.pth"):
        checkpoints.publish(
            written, run_folder / "checkpoint-10", ["rng_state_1.pth", "rng_state_0.pth", "model.safetensors"]
        )
    assert checkpoints.newest_complete(run_folder) == (run_folder / "checkpoint-10", [])
    assert (run_folder / "checkpoint-10" / "inner").is_dir()


def test_only_small_files_get_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_CHECKSUM_MAX_BYTES", 20)
    manifest = json.loads((write_checkpoint(tmp_path, 4) / checkpoints.MANIFEST).read_text())
    assert manifest["model.safetensors"] == {"bytes": 28}
    assert manifest["inner/state.json"].keys() == {"bytes", "sha256"}


def test_a_checksum_of_a_large_file_in_an_earlier_manifest_still_counts(run_folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "_CHECKSUM_MAX_BYTES", 20)
    assert checkpoints.damage(run_folder / "checkpoint-10") is None
    flip(run_folder / "checkpoint-10")
    assert (
        checkpoints.damage(run_folder / "checkpoint-10")
        == "model.safetensors has another checksum than when it was saved"
    )


# ---- Checkpoints of the stock Trainer ----


@pytest.mark.parametrize(
    "weights", ["adapter_model.safetensors", "model.safetensors", "other/adapter_model.safetensors"]
)
def test_a_checkpoint_of_the_stock_trainer_is_the_newest(weights, run_folder):
    stock = write_stock_checkpoint(run_folder, 12, weights)
    assert checkpoints.newest_complete(run_folder) == (stock, [])


def lose_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


def break_state(checkpoint):
    (checkpoint / "trainer_state.json").write_text("{")


def lose_weights(checkpoint):
    (checkpoint / "adapter_model.safetensors").unlink()


def empty_weights(checkpoint):
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")


def truncate_weights(checkpoint):
    content = (checkpoint / "adapter_model.safetensors").read_bytes()
    (checkpoint / "adapter_model.safetensors").write_bytes(content[:-1])


def lose_shard(checkpoint):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text("[]")


STOCK_DAMAGES = {
    lose_state: "has no trainer_state.json",
    break_state: "cannot be read",
    lose_weights: "holds no model",
    empty_weights: "adapter_model.safetensors is empty",
    truncate_weights: "adapter_model.safetensors cannot be read",
    lose_shard: "model-00001-of-00002.safetensors is missing",
    break_index: "model.safetensors.index.json names no shards",
}


@pytest.mark.parametrize("damage", STOCK_DAMAGES, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_the_stock_trainer_could_not_resume_is_skipped(damage, run_folder):
    damage(write_stock_checkpoint(run_folder, 12))
    found, skipped = checkpoints.newest_complete(run_folder)
    assert found == run_folder / "checkpoint-10"
    assert len(skipped) == 1
    assert STOCK_DAMAGES[damage] in skipped[0]


def test_one_of_ours_without_its_manifest_is_not_taken_for_a_stock_one(run_folder):
    checkpoint = write_stock_checkpoint(run_folder, 12)
    checkpoints.write_facts(checkpoint, {})
    assert checkpoints.newest_complete(run_folder)[0] == run_folder / "checkpoint-10"


# ---- What a full disk says ----


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("a message without a number"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: No such file or directory (os error 2)"), False),
        (SafetensorError("Error while serializing: invalid shape"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (RuntimeError("Parent directory out does not exist."), False),
        (PeerFailure("another rank failed: [enforce fail at inline_container.cc:672]"), False),
        (TypeError("unsupported operand"), False),
    ],
)
def test_only_a_disk_that_takes_no_more_is_called_so(error, refused):
    assert checkpoints.has_disk_refused(error) is refused
