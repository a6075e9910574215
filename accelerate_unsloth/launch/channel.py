"""
Short messages between ranks.

They go through the launcher's key-value store, not through NCCL or Gloo: they work before a process group exists, use no
GPU, and a wait ends as soon as another rank reports a failure. One server answers the requests of all ranks, and accepts no
message above 8 MiB. So messages are for set-up, saving and errors: the training step never uses them, and nothing that grows
with the data is sent this way. The keys of a message are deleted when no rank needs them any more.
"""

import atexit
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any

from .topology import Topology, attempt, topology

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.2
_LOOK_EVERY_S = 2.0  # for ranks that wait for each other in different calls
_STORE_TIMEOUT_S = 600.0
_WAIT_AT_EXIT_S = 5.0


class PeerFailure(RuntimeError):
    """Another rank failed and reports its error; this rank only has to end."""


class Channel:
    """
    Small JSON messages between the ranks of one launch, through a `torch.distributed.Store` that all of them can reach.

    All ranks call [`Channel.gather`], [`Channel.gather_within`] and the `run` methods in the same order, so that the n-th
    call of one rank belongs to the n-th call of the others.
    """

    def __init__(self, topology: Topology, store):
        self.topology = topology
        self._store = store
        self._calls = Counter()
        self._gathered = {}  # name of a gather -> the last key that this rank set
        self._waiting = False  # whether other ranks can see which gather this one waits in

    def _next_key(self, name: str) -> str:
        self._calls[name] += 1
        return f"{name}/{self._calls[name]}"

    def _post(self, key: str, message: Any) -> None:
        self._store.set(key, json.dumps(message))

    def _arrives(
        self, keys: list[str], timeout_s: float = math.inf, gives_up: Callable[[], Any] = lambda: False
    ) -> bool:
        """
        Wait until all `keys` exist, at most `timeout_s` seconds or until `gives_up()`; return whether they exist.

        `Store.wait` prints a warning for each timeout (torch 2.11 to 2.14, `socket.cpp`).
        """
        deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        while not self._store.check(keys):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or gives_up():
                return self._store.check(keys)
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return True

    def _receive(self, name: str, keys: list[str], senders: Iterable[int], is_gather: bool = False) -> list:
        """Return the messages under `keys`, one of each sender. Raise an error when one of them will not come."""
        look_s = time.monotonic() + _LOOK_EVERY_S

        def raise_if_lost():
            nonlocal look_s
            failed_rank = self.failed_rank()
            if failed_rank is not None:
                raise PeerFailure(f"rank {failed_rank} failed while rank {self.topology.rank} waited in {name!r}")
            for key, sender in zip(keys, senders, strict=True) if self._store.check(["ended"]) else ():
                if self._store.check([f"ended/{sender}"]) and not self._store.check([key]):
                    raise RuntimeError(
                        f"Rank {sender} ended, and rank {self.topology.rank} still waits for it in {name!r}. "
                        "Every rank has to make this call: look for a call that only some ranks reach."
                    )
            if time.monotonic() > look_s:
                look_s += _LOOK_EVERY_S
                self._raise_if_called_otherwise(name, dict(zip(senders, keys, strict=True)), is_gather)

        self._arrives(keys, gives_up=raise_if_lost)
        return [json.loads(message) for message in self._store.multi_get(keys)]

    def _raise_if_called_otherwise(self, name: str, keys: dict[int, str], is_gather: bool) -> None:
        """Raise an error if a rank that this one waits for waits for this one in another gather."""
        own = self.topology.rank
        if is_gather and not self._waiting:
            self._waiting = True
            self._post(f"waiting/{own}", {"name": name, "call": self._calls[name], "for": [*keys]})
        missing = next((rank for rank, key in keys.items() if rank != own and not self._store.check([key])), None)
        if missing is None or not self._store.check([f"waiting/{missing}"]):
            return
        other = json.loads(self._store.get(f"waiting/{missing}"))
        # If this rank has made that call, the other one is about to leave it.
        if other and own in other["for"] and self._calls[other["name"]] < other["call"]:
            raise RuntimeError(
                f"Rank {own} waits for rank {missing} in {name!r}, and that one for it in {other['name']!r}. All ranks have to do "
                "the same: look for code, options or memory that depend on the rank."
            )

    def gather(self, name: str, value: Any, ranks: Iterable[int] | None = None) -> list:
        """
        Collect one JSON-serialisable value from every rank, in rank order, on every rank.

        `name` is the same on all ranks. `ranks` are those that take part, this one among them; by default all.

        Raises:
            PeerFailure: if a rank fails before it has sent its value.
            RuntimeError: if a rank has ended, or waits in another call.
        """
        key, ranks = self._next_key(name), [*(range(self.topology.world_size) if ranks is None else ranks)]
        keys = [f"{key}/{rank}" for rank in ranks]
        own = f"{key}/{self.topology.rank}"
        self._post(own, value)
        values = self._receive(name, keys, ranks, is_gather=True)
        if self._waiting:  # not deleted: a rank that has seen the key would wait for it
            self._post(f"waiting/{self.topology.rank}", None)
            self._waiting = False
        if name in self._gathered:  # all ranks have sent this value, so they have read the previous one
            self._store.delete_key(self._gathered[name])
        self._gathered[name] = own
        return values

    def gather_within(self, name: str, value: Any, timeout_s: float) -> dict[int, Any]:
        """Return what each rank sends within `timeout_s` seconds, or `None` if it does not: for reports of errors."""
        call = self._next_key(name)
        keys = {rank: f"{call}/{rank}" for rank in range(self.topology.world_size)}
        self._post(keys[self.topology.rank], value)
        self._arrives(list(keys.values()), timeout_s)
        return {
            rank: json.loads(self._store.get(key)) if self._store.check([key]) else None for rank, key in keys.items()
        }

    def meet(self, name: str, timeout_s: float) -> None:
        """Wait until all ranks have made this call, one has failed, or `timeout_s` seconds have passed."""
        call = self._next_key(name)
        self._post(f"{call}/{self.topology.rank}", True)
        keys = [f"{call}/{rank}" for rank in range(self.topology.world_size)]
        self._arrives(keys, timeout_s, gives_up=lambda: self.failed_rank() is not None)

    def run_on_main(self, name: str, function: Callable[[], Any]) -> Any:
        """
        Run `function` on rank 0 while the others wait; return its result there and `None` elsewhere.

        Raises:
            PeerFailure: on the waiting ranks if `function` raises on rank 0.
        """
        return self._run_once(name, function, 0, self.topology.world_size - 1, lambda result: None)

    def run_on_local_main(self, name: str, function: Callable[[], Any]) -> Any:
        """
        Run `function` on the first process of each node, and return its JSON-serialisable result on all of that node.

        Raises:
            PeerFailure: on the waiting ranks if `function` raises on their node's first process.
        """
        return self._run_once(
            name, function, self.topology.local_main, self.topology.local_world_size - 1, lambda result: result
        )

    def _run_once(
        self, name: str, function: Callable, runner: int, readers: int, message: Callable[[Any], Any]
    ) -> Any:
        """Run `function` on the rank `runner`, and send `message(result)` to the `readers` other ranks that wait for it."""
        key = f"{self._next_key(name)}/{runner}"
        if self.topology.rank != runner:
            return self._receive_outcome(name, key, runner, readers)
        try:
            result = function()
            outcome = {"result": message(result)}
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            if readers:
                self._post(key, outcome)
        return result

    def _receive_outcome(self, name: str, key: str, sender: int, readers: int) -> Any:
        (outcome,) = self._receive(name, [key], [sender])
        counter = f"{key}/read"
        if self._store.add(counter, 1) == readers:  # all have read it
            self._store.delete_key(key)
            self._store.delete_key(counter)
        if "error" in outcome:
            raise PeerFailure(f"another rank failed in {name!r}: {outcome['error']}")
        return outcome["result"]

    def fail(self, report: str) -> tuple[int, str]:
        """Report to all ranks that this one ends with an error; return the rank that failed first, and its report."""
        rank = self.topology.rank
        self._post(f"failed/{rank}", report)
        first = int(self._store.compare_set("failed", "", str(rank)))
        return first, json.loads(self._store.get(f"failed/{first}"))

    def note_shown(self) -> None:
        """Report that this rank has printed the error."""
        self._store.set("shown", "")

    def wait_until_shown(self, timeout_s: float) -> None:
        """Wait until a rank has printed the error."""
        self._arrives(["shown"], timeout_s)

    def end(self) -> None:
        """Report that this rank sends nothing more."""
        with suppress(RuntimeError):  # the launcher, and its store with it, may be gone
            self._store.set(f"ended/{self.topology.rank}", "")
            self._store.set("ended", "")  # one key to check, whichever rank ended

    def wait_for_all_to_end(self, timeout_s: float) -> None:
        """Wait until all ranks have ended; for the rank whose process holds the store."""
        self._arrives([f"ended/{rank}" for rank in range(self.topology.world_size)], timeout_s)

    def failed_rank(self) -> int | None:
        """Return the first rank that reported a failure, if any."""
        return int(self._store.get("failed")) if self._store.check(["failed"]) else None

    def wait_for_failure_of_main(self, timeout_s: float) -> str | None:
        """Return the error that rank 0 reports within `timeout_s` seconds, or `None`, also if it ends without an error."""
        reported = self._arrives(["failed/0"], timeout_s, gives_up=lambda: self._store.check(["ended/0"]))
        return json.loads(self._store.get("failed/0")) if reported else None


@lru_cache(maxsize=1)
def channel() -> Channel:
    """Return the channel of this launch; one process without a launcher gets a channel to itself."""
    import torch.distributed as dist

    place = topology()
    if place.world_size == 1:
        return Channel(place, dist.HashStore())
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_STORE_TIMEOUT_S)))
    # Elastic restarts reuse the agent's store; the attempt in the prefix keeps messages of the last attempt apart.
    connected = Channel(place, dist.PrefixStore(f"accelerate_unsloth/{attempt()}", store))
    # Without torchelastic rank 0 holds the store, which the other ranks need for their last messages.
    if place.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        atexit.register(connected.wait_for_all_to_end, _WAIT_AT_EXIT_S)
    atexit.register(connected.end)  # runs first
    return connected
