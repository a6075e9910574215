"""Messages between ranks, with the ranks played by threads over one store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from accelerate_unsloth.channel import Channel, PeerFailure
from accelerate_unsloth.topology import Topology


def on_ranks(world_size, body, nodes=1):
    """Run `body(channel)` on every rank at once; its results, or the exceptions it raised, in rank order."""
    store, per_node = HashStore(), world_size // nodes
    channels = [
        Channel(Topology(rank, world_size, rank % per_node, per_node, rank // per_node), store)
        for rank in range(world_size)
    ]

    def guarded(channel):
        try:
            return body(channel)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(guarded, channels))


def test_topology_is_read_from_the_launchers_environment():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    assert Topology.from_environment(environment) == Topology(5, 8, 1, 4, 1)
    assert Topology.from_environment({}) == Topology(0, 1, 0, 1, 0)


def test_gather_gives_every_rank_all_values_in_rank_order():
    assert on_ranks(3, lambda c: c.gather("rank", {"is": c.topology.rank})) == [[{"is": 0}, {"is": 1}, {"is": 2}]] * 3


def test_calls_of_one_name_do_not_meet_each_other():
    def twice(channel):
        return channel.gather("x", 1), channel.gather("x", 2)

    assert on_ranks(2, twice) == [([1, 1], [2, 2])] * 2


def test_only_rank_0_runs_what_runs_on_main():
    ran = []
    results = on_ranks(3, lambda c: c.run_on_main("write", lambda: ran.append(c.topology.rank) or "done"))
    assert ran == [0]
    assert results == ["done", None, None]


def test_one_rank_of_each_node_runs_and_its_node_gets_the_result():
    results = on_ranks(4, lambda c: c.run_on_local_main("make", lambda: f"by {c.topology.rank}"), nodes=2)
    assert results == ["by 0", "by 0", "by 2", "by 2"]


def test_waiting_ranks_learn_that_the_running_one_failed():
    def body(channel):
        return channel.run_on_main("write", lambda: 1 / 0)

    first, second = on_ranks(2, body)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, PeerFailure)
    assert "division by zero" in str(second)


def test_a_wait_ends_when_any_rank_reports_a_failure():
    def body(channel):
        return channel.fail("broken") if channel.topology.rank == 1 else channel.gather("never sent by rank 1", 0)

    waiting, failing = on_ranks(2, body)
    assert isinstance(waiting, PeerFailure)
    assert failing == (1, "broken")


def test_a_wait_for_a_rank_that_has_ended_says_who_waits_for_what():
    def body(channel):
        return channel.end() if channel.topology.rank == 0 else channel.run_on_main("model", lambda: None)

    _, waiting = on_ranks(2, body)
    assert isinstance(waiting, RuntimeError)
    assert "Rank 0 ended, and rank 1 still waits for it in 'model'" in str(waiting)


def test_the_first_failure_is_the_one_that_counts():
    store = HashStore()
    first, second = (Channel(Topology(rank, 2), store) for rank in (0, 1))
    assert second.fail("mine") == (1, "mine")
    assert first.fail("a broken connection") == (1, "mine")
    assert first.failed_rank() == 1


@pytest.mark.parametrize("reported", [None, "same"])
def test_a_rank_hears_what_rank_0_reports_or_nothing(reported):
    store = HashStore()
    main, other = (Channel(Topology(rank, 2), store) for rank in (0, 1))
    if reported:
        main.fail(reported)
    assert other.wait_for_failure_of_main(timeout_s=0.1) == reported
