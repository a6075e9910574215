"""
Which layer is in which slot: copies begin one layer ahead of the computation, and no layer in use is overwritten.

Pure bookkeeping. A `Copier` moves the bytes, and orders copies and computation on the device without waiting for them.
"""

from bisect import bisect_left, bisect_right
from typing import Protocol


class Copier(Protocol):
    """Moves layers into slots, in the order of its calls."""

    def begin(self, layer: int, slot: int) -> None:
        """Begin to copy a layer, once the computation that [`Copier.release`] noted for the slot has ended."""

    def wait(self, slot: int) -> None:
        """Let the computation that is launched from now on wait for the copy into the slot."""

    def release(self, slot: int) -> None:
        """Note that all computation that reads the slot has been launched."""


class SlotPool:
    """
    Slots for the layers that are copied to the device.

    One layer is in use at a time: from its [`SlotPool.use`] until that of another layer. By then, all kernels that read it
    have been launched, in a forward as in a backward, where the gradient of a layer's input needs all of its weights.

    Args:
        layers (`list[int]`): Layers that are copied; all others are on the device.
        slots (`int`): Number of slots, at least 3: one in use, one being filled, and one that was just in use, so that no
            copy waits for the computation.
        copier ([`Copier`]): Moves the bytes.

    Example:

    ```python
    >>> from unittest.mock import Mock
    >>> from accelerate_unsloth.weights.slots import SlotPool
    >>> pool = SlotPool([0, 1, 2, 3], slots=3, copier=Mock())
    >>> [pool.use(layer) for layer in (0, 1, 2, 3)], pool.contents
    ([0, 1, 2, 0], [3, 1, 2])
    ```
    """

    def __init__(self, layers: list[int], slots: int, copier: Copier):
        self._layers, self._copier = sorted(layers), copier
        self.contents: list[int | None] = [None] * slots
        self._in_use: int | None = None  # slot
        self._arrived = [False] * slots  # whether the computation waits for the last copy

    def use(self, layer: int, forward: bool = True) -> int | None:
        """
        Put a layer into use, and begin to copy the next one.

        Args:
            layer (`int`): The layer that is computed next.
            forward (`bool`, *optional*, defaults to `True`): Whether the layer behind it follows, or the one before it.

        Returns:
            `int`: the slot that it is in, or `None` for a layer that is not copied.
        """
        slot = self._slot_of(layer)
        if self._in_use is not None and self._in_use != slot:
            self._copier.release(self._in_use)
            self._in_use = None
        if slot is None and self._is_copied(layer):
            slot = self._begin(layer, near=layer)
        if slot is not None:
            self._in_use = slot
            if not self._arrived[slot]:
                self._copier.wait(slot)
                self._arrived[slot] = True
        following = self._following(layer, forward)
        if following is not None and self._slot_of(following) is None:
            self._begin(following, near=layer)
        return slot

    def _begin(self, layer: int, near: int) -> int:
        """Begin to copy a layer into an empty slot, or that of the layer furthest from `near`."""

        def distance(slot: int) -> float:
            held = self.contents[slot]
            return float("inf") if held is None else abs(held - near)

        slot = max((slot for slot in range(len(self.contents)) if slot != self._in_use), key=distance)
        self._copier.begin(layer, slot)
        self.contents[slot], self._arrived[slot] = layer, False
        return slot

    def _slot_of(self, layer: int) -> int | None:
        return self.contents.index(layer) if layer in self.contents else None

    def _is_copied(self, layer: int) -> bool:
        index = bisect_left(self._layers, layer)
        return index < len(self._layers) and self._layers[index] == layer

    def _following(self, layer: int, forward: bool) -> int | None:
        """Return the next copied layer in the direction of travel; at its end there is none."""
        index = bisect_right(self._layers, layer) if forward else bisect_left(self._layers, layer) - 1
        return self._layers[index] if 0 <= index < len(self._layers) else None
