"""Two launchers as two machines on the loopback, two CPU processes each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accelerate_unsloth.reliability import checkpoints

from ..launching import WORKERS, launch, result
from ..machines import launch_two_machines

pytestmark = pytest.mark.launch


def train_on_two_machines(arguments, caches, placement="host", **how):
    """With a cache folder for each machine, and one copy of the frozen weights on each."""
    shared = {"ACCELERATE_UNSLOTH_FROZEN_WEIGHTS": placement}
    environments = [{"HF_HOME": str(cache), **shared} for cache in caches]
    return launch_two_machines(WORKERS / "train.py", arguments, environments, **how)


@pytest.fixture(scope="module")
def one_process(tiny_model, uneven_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    options = {"args": {"gradient_accumulation_steps": 4}}
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, folder, json.dumps(options)],
        processes=1,
        environment={"HF_HOME": str(folder / "cache")},
    )
    assert finished.status == 0, finished.output[-3000:]
    return folder


@pytest.fixture(scope="module")
def two_machines(tiny_model, uneven_data, tmp_path_factory):
    """The folder of an uninterrupted run of two machines, with or without a shared disk, run once; and their caches."""
    runs = {}

    def run(share_a_disk):
        if share_a_disk not in runs:
            folder = tmp_path_factory.mktemp("two")
            caches = [folder / "cache" / ("shared" if share_a_disk else str(rank)) for rank in (0, 1)]
            options = {"args": {"gradient_accumulation_steps": 1}, "save": True, "fetch": not share_a_disk}
            arguments = [tiny_model, uneven_data, folder, json.dumps(options)]
            machines = train_on_two_machines(arguments, caches, "host" if share_a_disk else "sharded")
            assert [m.status for m in machines] == [0, 0], "".join(m.output[-2000:] for m in machines)
            runs[share_a_disk] = folder, caches
        return runs[share_a_disk]

    return run


# The machines that are lost below share one.
@pytest.mark.parametrize("share_a_disk", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_machines_of_two_give_the_loss_curve_of_one_process(share_a_disk, one_process, two_machines):
    folder, caches = two_machines(share_a_disk)
    assert result(folder)["losses"] == pytest.approx(result(one_process)["losses"], rel=1e-5)
    # Each machine tokenises once, and one process in all writes.
    mapped = [max(result(folder, rank)["mapped_rows"], default=0) for rank in range(4)]
    assert mapped[1] <= 8
    assert mapped[3] <= 8
    assert [bool(result(folder, rank)["saves"]) for rank in range(4)] == [True, False, False, False]
    for rank in range(4):
        assert all(Path(file).is_relative_to(caches[rank // 2]) for file in result(folder, rank)["data_files"])
        assert result(folder, rank)["data_files"]
        # Of two layers each process holds one, where they are copied from one another.
        assert result(folder, rank)["shared"] == (14 if share_a_disk else 7) * [True]


# What is lost, on the machine of which rank, at the end of which step. Ranks 2 and 3 are the second machine's, and the
# launcher of the first one holds the rendezvous of both.
LOSSES = [("kill", 3, 2), ("lose_launcher", 2, 3), ("lose_power", 0, 5)]


@pytest.mark.slow
def test_a_machine_that_is_lost_ends_the_other_and_both_go_on_when_they_are_started_again(
    two_machines, tiny_model, uneven_data, tmp_path
):
    saving = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {"args": saving, "resume": "auto"}
    for what, rank, step in LOSSES:
        lost = options | {"provoke": {"what": what, "rank": rank, "step": step}}
        machines = train_on_two_machines(
            [tiny_model, uneven_data, tmp_path, json.dumps(lost)], [tmp_path / "cache"] * 2, real_launcher=True
        )
        assert all(machine.status != 0 for machine in machines)
        newest, _ = checkpoints.newest_complete(tmp_path / "run")
        # Killed before step's checkpoint; or, without a launcher, stopped in order by the step after it.
        assert newest.name in [f"checkpoint-{saved}" for saved in (step - 1, step, step + 1)]
    machines = train_on_two_machines(
        [tiny_model, uneven_data, tmp_path, json.dumps(options)], [tmp_path / "cache"] * 2, real_launcher=True
    )
    assert [m.status for m in machines] == [0, 0], "".join(m.output[-2000:] for m in machines)

    whole, _ = two_machines(False)
    assert result(tmp_path)["losses"] == result(whole)["losses"]
    one, other = (load_file(folder / "weights0.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


LOOP_SAVES = 20  # of workers/late_clear.py
LOOP_FILES = {"trained.safetensors", "optimizer.pt", "trainer_state.json"}
TRAINER_FILES = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}


@pytest.mark.parametrize("share_a_disk", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_machine_that_clears_late_takes_nothing_from_a_checkpoint(share_a_disk, tiny_model, uneven_data, tmp_path):
    machines = [tmp_path / "one", tmp_path / ("one" if share_a_disk else "other")]
    for folder in (tmp_path / "turns", *machines):
        folder.mkdir(exist_ok=True)
        (folder / "out").mkdir(exist_ok=True)
    arguments = [tiny_model, uneven_data, "out", tmp_path / "turns"]
    environments = [{"HF_HOME": str(folder / "cache")} for folder in machines]
    finished = launch_two_machines(WORKERS / "late_clear.py", arguments, environments, folders=machines)
    assert [m.status for m in finished] == [0, 0], "".join(m.output[-3000:] for m in finished)

    out = machines[0] / "out"
    assert json.loads((out / "clears0.json").read_text()) == LOOP_SAVES + 6
    saved = [(out / "loop" / str(number), LOOP_FILES, "random_rank{}.pt") for number in range(LOOP_SAVES)]
    saved += [(out / "run" / f"checkpoint-{step}", TRAINER_FILES, "rng_state_{}.pth") for step in range(1, 7)]
    for checkpoint, files, random_states in saved:
        assert checkpoints.damage(checkpoint) is None
        written = {file.name for file in checkpoint.iterdir()}
        assert files <= written, checkpoint
        held = [rank for rank in range(4) if random_states.format(rank) in written]
        assert held == ([0, 1, 2, 3] if share_a_disk else [0, 1]), checkpoint
    assert share_a_disk or not list(machines[1].glob("out/*/checkpoint-*"))
