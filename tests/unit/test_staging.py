"""The folder that all ranks write into: threads as ranks, on machines that share a disk or do not."""

import shutil
import threading

import pytest

from accelerate_unsloth.custom_loop import checkpoint
from accelerate_unsloth.launch.channel import Channel
from accelerate_unsloth.reliability import checkpoints

from .test_channel import on_ranks


@pytest.fixture
def here(monkeypatch):
    """What this thread takes for the channel of its process, as `here.channel`."""
    here = threading.local()
    for module in (checkpoints, checkpoint):
        monkeypatch.setattr(module, "channel", lambda: here.channel)
    monkeypatch.setattr(checkpoints, "topology", lambda: here.channel.topology)
    return here


@pytest.fixture
def late_machine(here, monkeypatch):
    """The second machine clears when rank 0 has cleared, and waits for all ranks."""
    rank_0_waits, rmtree, gather = threading.Event(), shutil.rmtree, Channel.gather

    def clear(folder, **options):
        if here.channel.topology.rank == 1:
            assert rank_0_waits.wait(20)
        rmtree(folder, **options)

    def meet(channel, name, value):
        if channel.topology.is_main:
            rank_0_waits.set()
        return gather(channel, name, value)

    monkeypatch.setattr(shutil, "rmtree", clear)
    monkeypatch.setattr(Channel, "gather", meet)


@pytest.mark.usefixtures("late_machine")
@pytest.mark.parametrize(
    ("disks", "shares"),
    [
        (["a", "a"], [True, True]),
        (["a", "b"], [True, False]),
        (["a", "b", "a"], [True, False, True]),
        (["a", "b", "b"], [True, False, False]),
    ],
)
def test_what_a_rank_writes_stays_and_is_required_where_rank_0_sees_it(disks, shares, here, tmp_path):
    for disk in disks:
        (tmp_path / disk / "staging" / "left").mkdir(parents=True, exist_ok=True)

    def write(channel):
        here.channel, rank = channel, channel.topology.rank
        folder = tmp_path / disks[rank] / "staging"
        shares_disk = checkpoints.prepare_staging(folder)
        (folder / str(rank)).touch()
        return shares_disk, checkpoints.gather_required([str(rank)], shares_disk)

    found = on_ranks(len(disks), write, nodes=len(disks))
    required = [str(rank) for rank, shared in enumerate(shares) if shared]
    assert found == [(shared, required) for shared in shares]
    for rank, disk in enumerate(disks):
        assert (tmp_path / disk / "staging" / str(rank)).exists()
        assert not (tmp_path / disk / "staging" / "left").exists()


def test_one_process_of_a_machine_reads_a_checkpoint_for_all_and_all_learn_of_damage(here, tmp_path, monkeypatch):
    for node in (0, 1):
        (tmp_path / "written").mkdir()
        (tmp_path / "written" / "optimizer.pt").touch()
        checkpoints.publish(tmp_path / "written", tmp_path / str(node))
    (tmp_path / "1" / "optimizer.pt").unlink()
    readers, damage = [], checkpoints.damage

    def read(folder):
        readers.append(here.channel.topology.rank)
        return damage(folder)

    def check(channel):
        here.channel = channel
        return checkpoint._damage_on_any_machine(tmp_path / str(channel.topology.node))

    monkeypatch.setattr(checkpoints, "damage", read)
    assert on_ranks(4, check, nodes=2) == ["optimizer.pt is missing (on the machine of rank 2)"] * 4
    assert sorted(readers) == [0, 2]
