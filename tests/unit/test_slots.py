"""The pool of slots, on a device that copies and computes late: any order of layers reads the right bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate_unsloth.weights.slots import SlotPool


class LateDevice:
    """
    A device with a queue for copies and one for computation, each of which runs when `order` says so.

    A computation reads a slot when it runs, not when it is launched.
    """

    def __init__(self, slots: int):
        self.copies, self.computation = [], []
        self.ran_copies = self.ran_computation = 0
        self.memory = [None] * slots  # what is in each slot; `"half"` while a copy has begun and not ended
        self.last_copy, self.free_after = [0] * slots, [0] * slots
        self.read = []

    # What the pool asks for.
    def begin(self, layer, slot):
        self.copies.append((layer, slot, self.free_after[slot]))
        self.last_copy[slot] = len(self.copies)

    def wait(self, slot):
        self.computation.append(("wait", self.last_copy[slot]))

    def release(self, slot):
        self.free_after[slot] = len(self.computation)

    # What the device does.
    def compute(self, layer, slot):
        self.computation.append(("read", layer, slot))

    def run_copy(self) -> bool:
        """Run half a copy; return whether one could run."""
        index, half = divmod(self.ran_copies, 2)
        if index == len(self.copies):
            return False
        layer, slot, after = self.copies[index]
        if self.ran_computation < after:
            return False
        self.memory[slot] = layer if half else "half"
        self.ran_copies += 1
        return True

    def run_computation(self) -> bool:
        if self.ran_computation == len(self.computation):
            return False
        what, *rest = self.computation[self.ran_computation]
        if what == "wait" and self.ran_copies < 2 * rest[0]:
            return False
        if what == "read":
            layer, slot = rest
            self.read.append((layer, self.memory[slot]))
        self.ran_computation += 1
        return True

    def run(self, copies_first: bool) -> None:
        """Run one piece of work, of the preferred queue if that can run."""
        queues = [self.run_copy, self.run_computation]
        any(run() for run in (queues if copies_first else reversed(queues)))

    def finish(self) -> None:
        while self.run_copy() or self.run_computation():
            pass


passes = st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=60)


@given(passes, st.sets(st.integers(0, 7), min_size=1), st.integers(3, 5), st.lists(st.booleans(), max_size=200))
def test_every_computation_reads_its_own_layer(uses, copied, slots, order):
    """Forward, recomputation, backward, evaluation and an early stop are all orders of layers."""
    device, order = LateDevice(slots), iter(order)
    pool = SlotPool([*copied], slots, device)
    for layer, forward in uses:
        slot = pool.use(layer, forward)
        assert (slot is None) == (layer not in copied)
        if slot is not None:
            assert pool.contents[slot] == layer
            device.compute(layer, slot)
        for preferred in (next(order, None), next(order, None)):
            if preferred is not None:
                device.run(preferred)
    device.finish()
    assert device.ran_computation == len(device.computation)  # nothing waits for ever
    assert all(found == layer for layer, found in device.read)
    assert len(device.read) == sum(layer in copied for layer, _ in uses)


def layers_of_a_step(number: int) -> list[tuple[int, bool]]:
    return [(layer, True) for layer in range(number)] + [(layer, False) for layer in reversed(range(number))]


@pytest.mark.parametrize("copied", [range(8), range(0, 8, 2)])
def test_a_step_copies_ahead_and_each_layer_once_per_direction(copied):
    device = LateDevice(3)
    pool = SlotPool([*copied], 3, device)
    for _ in range(3):
        for layer, forward in layers_of_a_step(8):
            known = len(device.copies)
            before = [*pool.contents]
            pool.use(layer, forward)
            is_first = known == 0
            if layer in copied and not is_first:
                assert layer in before  # it was begun while another layer was computed
    # Those around both turns stay where they are.
    assert len(device.copies) <= len(copied) + 5 * (len(copied) - 2)


def test_a_slot_that_is_filled_too_early_would_be_noticed(monkeypatch):
    """The device of these tests can tell a pool that releases nothing."""
    monkeypatch.setattr(LateDevice, "release", lambda self, slot: None)
    device = LateDevice(3)
    pool = SlotPool([*range(6)], 3, device)
    for layer in range(6):
        device.compute(layer, pool.use(layer))
    device.finish()
    assert any(found != layer for layer, found in device.read)
