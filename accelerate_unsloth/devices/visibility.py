"""
Which GPUs CUDA would show to this process, and in which order, worked out without starting CUDA.

`CUDA_VISIBLE_DEVICES` holds indices or the beginnings of UUIDs, and the first entry that names no GPU cuts the list
(CUDA C++ Programming Guide, "CUDA Environment Variables").
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .nvml import Gpu


@dataclass(frozen=True)
class Visibility:
    """The visible GPUs, `gpus[i]` being `cuda:i`, and what has to be known beside them."""

    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...] = ()


def resolve(gpus: Sequence[Gpu], visible_devices: str | None, device_order: str | None = None) -> Visibility:
    """
    Map the machine's GPUs to those that CUDA would show.

    Args:
        gpus (`Sequence[Gpu]`):
            All GPUs, in the order of the PCI bus.
        visible_devices (`str`, *optional*):
            The value of `CUDA_VISIBLE_DEVICES`; `None` if it is not set.
        device_order (`str`, *optional*):
            The value of `CUDA_DEVICE_ORDER`. CUDA's own default puts the fastest GPU first and leaves the order of the
            others open, which can only be known if all GPUs are of one kind.

    Returns:
        [`Visibility`]: whole GPUs only; MIG slices are kept out, with a note.

    Example:

    ```python
    >>> from accelerate_unsloth import visibility
    >>> from accelerate_unsloth.devices.nvml import Gpu
    >>> gpus = [Gpu(i, f"GPU-{i}", "H200", 139.8, (9, 0)) for i in range(4)]
    >>> [gpu.system_index for gpu in visibility.resolve(gpus, "3,1,-1,0").gpus]
    [3, 1]
    ```
    """
    if not gpus:
        return Visibility(())
    chosen, notes = (tuple(gpus), []) if visible_devices is None else _named(gpus, visible_devices)
    split = [gpu for gpu in chosen if gpu.is_split]
    if split:
        notes.append(
            f"GPU(s) {_numbers(split)} of nvidia-smi are in MIG mode and kept out: CUDA shows slices of them, and "
            "training takes whole GPUs."
        )
    by_index = visible_devices is None or not visible_devices.strip().startswith("GPU-")
    kinds = {(gpu.name, gpu.total_gib, gpu.compute_capability) for gpu in gpus}
    if by_index and chosen and len(kinds) > 1 and device_order != "PCI_BUS_ID":
        notes.append(
            "The GPUs are not all of one kind, so CUDA may count them in another order than is shown here. Set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID to make it the same."
        )
    return Visibility(tuple(gpu for gpu in chosen if not gpu.is_split), tuple(notes))


def _named(gpus: Sequence[Gpu], value: str) -> tuple[tuple[Gpu, ...], list[str]]:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES names, up to the first entry that names none."""
    entries, named = [entry.strip() for entry in value.split(",")], []
    if entries[0].startswith("MIG-"):
        return (), [f"CUDA_VISIBLE_DEVICES={value!r} names slices of GPUs (MIG); only whole GPUs are listed here."]
    find = _by_uuid if entries[0].startswith("GPU-") else _by_index
    for entry in entries:
        gpu = find(gpus, entry)
        if gpu is None:
            return tuple(named), [_why_cut(value, entry, len(named), len(gpus))]
        if gpu in named:
            return (), [f"CUDA_VISIBLE_DEVICES={value!r} names a GPU twice, so CUDA shows none. Name each one once."]
        named.append(gpu)
    return tuple(named), []


def _by_index(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    """CUDA reads the number that an entry begins with, and passes over what follows it."""
    number = re.match(r"\+?\d+", entry)
    index = int(number[0]) if number else -1
    return gpus[index] if 0 <= index < len(gpus) else None


def _by_uuid(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    """An entry may be the beginning of a UUID, if it is that of one GPU only."""
    found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _why_cut(value: str, entry: str, kept: int, total: int) -> str:
    if kept == 0 and entry in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={value!r} hides all {total} GPU(s)."
    return (
        f"CUDA_VISIBLE_DEVICES={value!r} is cut at {entry!r}, which names none of the {total} GPU(s): {kept} visible."
    )


def _numbers(gpus: Sequence[Gpu]) -> str:
    return ", ".join(str(gpu.system_index) for gpu in gpus)
