"""
Short messages between ranks.

They go through the launcher's key-value store, not through NCCL or Gloo: they work before a process group exists, touch
no GPU, and a wait ends as soon as another rank reports a failure. They are for set-up, saving and errors; the training
step never uses them.
"""

import atexit
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any

from .topology import Topology, attempt, topology

_POLL_S = 1.0
_STORE_TIMEOUT_S = 600.0


class PeerFailure(RuntimeError):
    """Another rank failed and reports it; this one only has to end."""


class Channel:
    """
    Small JSON messages between the ranks of one launch.

    Every method but [`Channel.fail`] is collective: all ranks call the same methods in the same order, so that the
    n-th call of one rank meets the n-th call of the others.

    Args:
        topology ([`Topology`]): The place of this process.
        store (`torch.distributed.Store`): A store that all ranks reach.

    Example:

    ```python
    >>> from torch.distributed import HashStore
    >>> from accelerate_unsloth.channel import Channel
    >>> from accelerate_unsloth.topology import Topology
    >>> Channel(Topology(), HashStore()).gather("seed", 42)
    [42]
    ```
    """

    def __init__(self, topology: Topology, store):
        self.topology = topology
        self._store = store
        self._calls = Counter()

    def _next_key(self, name: str) -> str:
        self._calls[name] += 1
        return f"{name}/{self._calls[name]}"

    def _post(self, key: str, message: Any) -> None:
        self._store.set(key, json.dumps(message))

    def _receive(self, key: str, sender: int) -> Any:
        while not self._store.check([key]):
            failed_rank = self.failed_rank()
            if failed_rank is not None:
                raise PeerFailure(f"rank {failed_rank} failed while rank {self.topology.rank} waited for {key!r}")
            if self._store.check([f"ended/{sender}"]) and not self._store.check([key]):
                raise RuntimeError(
                    f"Rank {sender} ended, and rank {self.topology.rank} still waits for it in {key.split('/')[0]!r}. "
                    "Every rank has to make this call: look for one that only some ranks reach."
                )
            try:
                self._store.wait([key], timedelta(seconds=_POLL_S))
            except RuntimeError:  # the poll interval is over: look for failures again
                continue
        return json.loads(self._store.get(key))

    def gather(self, name: str, value: Any) -> list:
        """
        Collect one JSON-serialisable value from every rank, in rank order, on every rank.

        Raises:
            PeerFailure: if a rank fails before it has sent its value.
        """
        key = self._next_key(name)
        self._post(f"{key}/{self.topology.rank}", value)
        return [self._receive(f"{key}/{rank}", rank) for rank in range(self.topology.world_size)]

    def exchange(self, name: str, value: Any, timeout_s: float) -> dict[int, Any]:
        """
        As [`Channel.gather`], for when something is wrong: takes what arrives within `timeout_s` seconds.

        Returns:
            `dict[int, Any]`: the value of each rank, or `None` for one that did not send it in time.
        """
        key = self._next_key(name)
        self._post(f"{key}/{self.topology.rank}", value)
        deadline, values = time.monotonic() + timeout_s, {}
        for rank in range(self.topology.world_size):
            with suppress(RuntimeError):
                left_s = max(deadline - time.monotonic(), 0.1)
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=left_s))
            arrived = self._store.check([f"{key}/{rank}"])
            values[rank] = json.loads(self._store.get(f"{key}/{rank}")) if arrived else None
        return values

    def run_on_main(self, name: str, function: Callable[[], Any]) -> Any:
        """
        Run `function` on rank 0 while the others wait; returns its result there and `None` elsewhere.

        Raises:
            PeerFailure: on the waiting ranks if `function` raises on rank 0.
        """
        key = self._next_key(name)
        if self.topology.is_main:
            return self._run_and_report(key, function, lambda result: None)
        return self._receive_outcome(key, sender=0)

    def run_on_local_main(self, name: str, function: Callable[[], Any]) -> Any:
        """
        Run `function` on the first process of each node, and give its JSON-serialisable result to all of that node.

        Raises:
            PeerFailure: on the waiting ranks if `function` raises on their node's first process.
        """
        key = f"{self._next_key(name)}/node{self.topology.node}"
        if self.topology.is_local_main:
            return self._run_and_report(key, function, lambda result: result)
        return self._receive_outcome(key, sender=self.topology.rank - self.topology.local_rank)

    def _run_and_report(self, key: str, function: Callable[[], Any], message: Callable[[Any], Any]) -> Any:
        try:
            result = function()
        except BaseException as error:
            self._post(key, {"error": f"{type(error).__name__}: {error}"})
            raise
        self._post(key, {"result": message(result)})
        return result

    def _receive_outcome(self, key: str, sender: int) -> Any:
        outcome = self._receive(key, sender)
        if "error" in outcome:
            raise PeerFailure(f"another rank failed in {key!r}: {outcome['error']}")
        return outcome["result"]

    def fail(self, report: str) -> tuple[int, str]:
        """
        Tell every rank that this one ends with an error.

        Args:
            report (`str`): The error in words.

        Returns:
            `tuple[int, str]`: the rank that failed first, and its report.
        """
        rank = self.topology.rank
        self._post(f"failed/{rank}", report)
        first = int(self._store.compare_set("failed", "", str(rank)))
        return first, json.loads(self._store.get(f"failed/{first}"))

    def end(self) -> None:
        """Tell the others that this rank sends nothing more."""
        with suppress(RuntimeError):  # the launcher, and its store with it, may be gone already
            self._store.set(f"ended/{self.topology.rank}", "")

    def failed_rank(self) -> int | None:
        """The first rank that reported a failure, if any."""
        return int(self._store.get("failed")) if self._store.check(["failed"]) else None

    def wait_for_failure_of_main(self, timeout_s: float) -> str | None:
        """What rank 0 reported as its error, or `None` if it reports none within `timeout_s` seconds."""
        try:
            self._store.wait(["failed/0"], timedelta(seconds=timeout_s))
        except RuntimeError:
            return None
        return json.loads(self._store.get("failed/0"))


@lru_cache(maxsize=1)
def channel() -> Channel:
    """The channel of this launch; of one process without a launcher, a channel to itself."""
    import torch.distributed as dist

    place = topology()
    if place.world_size == 1:
        return Channel(place, dist.HashStore())
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_STORE_TIMEOUT_S)))
    # Elastic restarts reuse the agent's store; without the attempt in the prefix a rank would read the last attempt's.
    connected = Channel(place, dist.PrefixStore(f"accelerate_unsloth/{attempt()}", store))
    atexit.register(connected.end)
    return connected
