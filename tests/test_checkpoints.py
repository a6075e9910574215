"""Checkpoints on disk: what is complete, what is damaged, and what may be deleted."""

from pathlib import Path

import pytest

from accelerate_unsloth import checkpoints


@pytest.fixture
def run_folder(tmp_path):
    """A run with the checkpoints 2, 4 and 10."""
    for step in (2, 4, 10):
        written = tmp_path / checkpoints.STAGING / f"checkpoint-{step}"
        (written / "inner").mkdir(parents=True)
        (written / "model.safetensors").write_bytes(b"weights" * step)
        (written / "inner" / "state.json").write_text(str(step))
        checkpoints.publish(written, tmp_path / f"checkpoint-{step}")
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
    flip: "the checksum of model.safetensors is another",
    lose_file: "state.json is missing",
    lose_manifest: "has no manifest.json",
    break_manifest: "manifest.json cannot be read",
}


def test_the_newest_is_the_one_of_the_highest_step(run_folder):
    assert checkpoints.newest_complete(run_folder) == (run_folder / "checkpoint-10", [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, run_folder):
    damage(run_folder / "checkpoint-10")
    found, passed_over = checkpoints.newest_complete(run_folder)
    assert found == run_folder / "checkpoint-4"
    assert len(passed_over) == 1
    assert "checkpoint-10 is passed over" in passed_over[0]
    assert DAMAGES[damage] in passed_over[0]


def test_what_was_not_published_is_invisible(run_folder):
    (run_folder / checkpoints.STAGING / "checkpoint-12").mkdir(parents=True, exist_ok=True)
    assert checkpoints.newest_complete(run_folder)[0] == run_folder / "checkpoint-10"


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoints.newest_complete(tmp_path) == (None, [])
    assert checkpoints.newest_complete(tmp_path / "absent") == (None, [])


def names(run_folder):
    return sorted(path.name for path in run_folder.glob("*checkpoint-*"))


def test_rotation_deletes_the_oldest_and_leaves_nothing_behind(run_folder):
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-10"})
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]


def test_rotation_keeps_the_one_just_published_though_an_earlier_run_left_a_higher_step(run_folder):
    written = run_folder / checkpoints.STAGING / "checkpoint-6"
    written.mkdir(parents=True, exist_ok=True)
    checkpoints.publish(written, run_folder / "checkpoint-6")
    checkpoints.rotate(run_folder, 1, {run_folder / "checkpoint-6"})
    assert names(run_folder) == ["checkpoint-6"]


def test_rotation_keeps_the_best_however_its_path_is_written(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    checkpoints.rotate(run_folder, 1, {run_folder / "checkpoint-10", Path("checkpoint-2")})
    assert names(run_folder) == ["checkpoint-10", "checkpoint-2"]


def test_what_a_dying_process_left_half_deleted_is_cleared(run_folder):
    (run_folder / ".deleted-checkpoint-2" / "inner").mkdir(parents=True)
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-10"})
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_deleted(run_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "checkpoint-2"
    (run_folder / "checkpoint-2").rename(elsewhere)
    (run_folder / "checkpoint-2").symlink_to(elsewhere)
    checkpoints.rotate(run_folder, 2, {run_folder / "checkpoint-10"})
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]
    assert checkpoints.damage(elsewhere) is None


def test_without_a_limit_nothing_is_deleted(run_folder):
    checkpoints.rotate(run_folder, None, set())
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
