"""Messages between ranks, with the ranks played by threads over one store."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from accelerate_unsloth.launch import channel as channel_module
from accelerate_unsloth.launch.channel import Channel, PeerFailure
from accelerate_unsloth.launch.topology import Topology

from ..stores import WatchedStore


def connect(world_size, nodes=1, stores=None):
    """A channel of each rank; over one store, or each over a client of its own."""
    per_node, stores = world_size // nodes, stores or [HashStore()] * world_size
    places = [
        Topology(rank, world_size, rank % per_node, per_node, rank // per_node, rank - rank % per_node)
        for rank in range(world_size)
    ]
    return [Channel(place, WatchedStore(store)) for place, store in zip(places, stores, strict=True)]


def on_ranks(world_size, body, nodes=1, stores=None):
    """Run `body(channel)` on every rank at once; its results, or the exceptions it raised, in rank order."""

    def guarded(channel):
        try:
            return body(channel)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(guarded, connect(world_size, nodes, stores)))


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


def test_a_meeting_ends_with_the_last_rank_a_failure_or_the_time(monkeypatch):
    """A rank that sees the others there has waited for all of them."""
    there = []

    def meets(channel):
        there.append(channel.topology.rank)
        channel.meet("end", 60)
        return len(there)

    assert on_ranks(3, meets) == [3, 3, 3]
    left_alone, failing = connect(2)
    left_alone.meet("end", 0.01)
    failing.fail("broken")
    monkeypatch.setattr(channel_module.time, "sleep", lambda pause_s: pytest.fail("it waits for a rank that failed"))
    left_alone.meet("end", 60)


def test_the_first_failure_is_the_one_that_counts():
    first, second = connect(2)
    assert second.fail("mine") == (1, "mine")
    assert first.fail("a broken connection") == (1, "mine")
    assert first.failed_rank() == 1


@pytest.mark.parametrize("reported", [None, "same"])
def test_a_rank_hears_what_rank_0_reports_or_nothing(reported):
    main, other = connect(2)
    if reported:
        main.fail(reported)
    assert other.wait_for_failure_of_main(timeout_s=0.1) == reported


def test_nobody_waits_for_the_report_of_a_rank_0_that_has_ended():
    main, other = connect(2)
    main.end()
    assert other.wait_for_failure_of_main(timeout_s=3600.0) is None


def test_what_has_not_arrived_in_time_is_none():
    main, other = connect(2)
    assert main.gather_within("stuck", "here", timeout_s=0.01) == {0: "here", 1: None}
    assert other.gather_within("stuck", "there", timeout_s=10.0) == {0: "here", 1: "there"}


def test_a_gather_takes_as_many_requests_for_many_ranks_as_for_two():
    def requests_of_the_last_to_come(world_size):
        *early, late = connect(world_size)
        with ThreadPoolExecutor(world_size) as pool:
            for round_ in (1, 2):  # the second round also deletes
                waiting = [pool.submit(channel.gather, "x", round_) for channel in early]
                while not early[0]._store.store.check([f"x/{round_}/{channel.topology.rank}" for channel in early]):
                    time.sleep(0.001)
                assert late.gather("x", round_) == [round_] * world_size
                assert [call.result() for call in waiting] == [[round_] * world_size] * len(early)
        return late._store.requests

    assert requests_of_the_last_to_come(8) == requests_of_the_last_to_come(2)


def hash_stores():
    return [HashStore()] * 4


def tcp_stores():
    timeout = timedelta(seconds=30)
    server = TCPStore("127.0.0.1", 0, 1, True, timeout)
    clients = [TCPStore("127.0.0.1", server.port, 1, False, timeout) for _ in range(3)]
    return [PrefixStore("accelerate_unsloth/0", store) for store in (server, *clients)]


@pytest.mark.parametrize("make_stores", [hash_stores, tcp_stores])
def test_the_store_does_not_grow(make_stores):
    stores = make_stores()
    keys_before = stores[0].num_keys()

    def work(channel):
        for number in range(350):
            assert channel.gather("number", number) == [number] * 4
            assert channel.run_on_main("main", lambda number=number: number) in (number, None)
            assert channel.run_on_local_main("local", lambda number=number: number) == number

    assert on_ranks(4, work, nodes=2, stores=stores) == [None] * 4
    assert stores[0].num_keys() - keys_before == 4  # of the last gather


def test_keys_of_a_failed_call_do_no_harm():
    """A rank that fails in one call, and others that go on, as a script that catches errors does."""

    def work(channel):
        errors = 0
        for number in range(3):
            try:
                channel.run_on_main("write", lambda number=number: 1 / (number - 1))
            except (ZeroDivisionError, PeerFailure):
                errors += 1
            assert channel.gather("number", number) == [number] * 3
        return errors

    assert on_ranks(3, work) == [1, 1, 1]


# ---- Ranks that call different things ----


@pytest.fixture
def looks_often(monkeypatch):
    monkeypatch.setattr(channel_module, "_LOOK_EVERY_S", 0.01)


def when_it_waits(channel, rank, name):
    """Wait until another rank can be seen to wait in a call."""
    key = f"waiting/{rank}"

    def waits():
        return channel._store.check([key]) and (json.loads(channel._store.get(key)) or {}).get("name") == name

    channel._arrives(["never"], timeout_s=30, gives_up=waits)
    assert waits()


def test_ranks_that_wait_for_each_other_in_different_calls_are_told_so(looks_often):
    results = on_ranks(2, lambda c: c.gather(["settings", "frozen weights"][c.topology.rank], 0))
    for rank, (own, other) in enumerate([("settings", "frozen weights"), ("frozen weights", "settings")]):
        assert isinstance(results[rank], RuntimeError)
        assert f"Rank {rank} waits for rank {1 - rank} in {own!r}, and that one for it in {other!r}" in str(
            results[rank]
        )


def test_a_rank_that_runs_what_others_wait_for_may_not_wait_for_them(looks_often):
    def body(channel):
        if channel.topology.rank == 0:
            return channel.gather("settings", 0)
        try:
            return channel.run_on_main("write", lambda: None)
        finally:
            channel.end()

    assert "waits for rank 0 in 'write', and that one for it in 'settings'" in str(on_ranks(2, body)[1])


def test_a_slow_rank_is_waited_for_and_the_next_call_as_well(looks_often):
    def body(channel):
        if channel.topology.rank == 1:
            when_it_waits(channel, 0, "x")
        first = channel.gather("x", 1)
        if channel.topology.rank == 0:
            when_it_waits(channel, 1, "y")
        return first, channel.gather("y", 2)

    assert on_ranks(2, body) == [([1, 1], [2, 2])] * 2


def test_a_node_may_meet_while_others_wait_for_all(looks_often):
    """Rank 1 comes late to its node's call, for which rank 0 waits; ranks 2 and 3 wait for both in the next one."""

    def body(channel):
        rank = channel.topology.rank
        if rank == 1:
            for other, name in ((0, "node"), (2, "all"), (3, "all")):
                when_it_waits(channel, other, name)
        own = channel.gather("node", rank, channel.topology.node_ranks) if rank < 2 else None
        return own, channel.gather("all", rank)

    everyone = [0, 1, 2, 3]
    assert on_ranks(4, body, nodes=2) == [([0, 1], everyone), ([0, 1], everyone), (None, everyone), (None, everyone)]


def test_the_ranks_of_a_node_are_those_of_its_host_name():
    places = [Topology.from_hosts(["a", "b", "a", "b"], rank, {}) for rank in range(4)]
    assert [place.node_ranks for place in places] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert Topology(3, 4, 1, 2, 1, 2).node_ranks == (2, 3)
