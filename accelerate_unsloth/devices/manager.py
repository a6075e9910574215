"""The GPUs that this process may use, and readings of them and of the host, without creating a CUDA context."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from .nvml import GIB, Gpu, GpuProcess, GpuReading, NvmlReader

_FIRST_WITH_BF16 = (8, 0)


@dataclass(frozen=True)
class Device:
    """One visible GPU."""

    index: int  # in CUDA, as in `cuda:0`
    system_index: int  # in `nvidia-smi`
    uuid: str  # for `CUDA_VISIBLE_DEVICES`; means the same in every process
    name: str
    total_gib: float
    free_gib: float
    compute_capability: tuple[int, int]  # for example `(9, 0)`
    bf16: bool  # whether it computes in bfloat16
    links: dict[int, str] = field(default_factory=dict, hash=False)  # by index of another GPU: see `NvmlReader.link`
    processes: tuple[GpuProcess, ...] = ()  # that hold memory on it


@dataclass(frozen=True)
class HostReading:
    """Memory of the machine and of this process, and CPU usage since the previous reading."""

    total_gib: float
    available_gib: float
    process_gib: float
    cpu_percent: float


@dataclass(frozen=True)
class Snapshot:
    """The readings of one moment; the keys of `gpus` are CUDA's indices."""

    gpus: dict[int, GpuReading] = field(hash=False)
    host: HostReading


class DeviceManager:
    """
    The GPUs and the host as this process sees them.

    Args:
        reader ([`NvmlReader`], *optional*):
            The source of GPU readings.
        environment (`Mapping[str, str]`, *optional*):
            The source of `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER`, read once; by default `os.environ`.

    `notes` says why there is no GPU, or which GPUs are left out; `driver` is the version of the driver.

    Example:

    ```python
    >>> from accelerate_unsloth import DeviceManager
    >>> devices = DeviceManager()
    >>> names = [gpu.name for gpu in devices.get_available_devices()]
    >>> devices.snapshot().host.total_gib > 0
    True
    ```
    """

    def __init__(self, reader=None, environment: Mapping[str, str] | None = None):
        # Not a default argument: `datasets.map(num_proc=2)` replaces `os.environ` by a copy (datasets 4.8, arrow_dataset.py).
        environment = os.environ if environment is None else environment
        self._reader = NvmlReader() if reader is None else reader
        self._gpus, notes = visible_gpus(
            self._reader.gpus, environment.get("CUDA_VISIBLE_DEVICES"), environment.get("CUDA_DEVICE_ORDER")
        )
        self.notes = (*self._reader.notes, *notes)
        self.driver: str | None = self._reader.driver
        psutil.cpu_percent()  # begins the first interval

    def get_available_devices(self) -> list[Device]:
        """Return the visible GPUs as they are now, in CUDA's order; without any, `notes` says why."""
        return [self._device(index, gpu) for index, gpu in enumerate(self._gpus)]

    def _device(self, index: int, gpu: Gpu) -> Device:
        reading, own = self._reader.reading(gpu.system_index), gpu.system_index
        return Device(
            index=index,
            system_index=own,
            uuid=gpu.uuid,
            name=gpu.name,
            total_gib=reading.total_gib,
            free_gib=reading.free_gib,
            compute_capability=gpu.compute_capability,
            bf16=gpu.compute_capability >= _FIRST_WITH_BF16,
            links={i: self._reader.link(own, o.system_index) for i, o in enumerate(self._gpus) if i != index},
            processes=self._reader.processes(own),
        )

    def select(self, num_gpus: int, min_free_gib: float = 0.0) -> list[Device]:
        """
        Return the GPUs with the most free memory, in CUDA's order.

        Args:
            num_gpus (`int`):
                The number of GPUs.
            min_free_gib (`float`, *optional*, defaults to `0.0`):
                The free memory that each of them must have, in GiB.

        Raises:
            ValueError: if there are fewer, with both numbers and the free memory of each GPU.
        """
        if num_gpus < 1:
            raise ValueError(f"num_gpus={num_gpus!r} is not a number of GPUs. Ask for at least 1.")
        devices = self.get_available_devices()
        enough = [device for device in devices if device.free_gib >= min_free_gib]
        if len(enough) < num_gpus:
            free = ", ".join(f"cuda:{device.index} {device.free_gib:.1f}" for device in devices) or "none"
            raise ValueError(
                f"num_gpus={num_gpus} with min_free_gib={min_free_gib} was asked for, but {len(enough)} of "
                f"{len(devices)} visible GPU(s) have that much free memory (GiB: {free}). Ask for fewer GPUs or less "
                f"memory, end what holds it, or make more GPUs visible with CUDA_VISIBLE_DEVICES. {' '.join(self.notes)}"
            )
        freest = sorted(enough, key=lambda device: -device.free_gib)[:num_gpus]
        return sorted(freest, key=lambda device: device.index)

    def snapshot(self) -> Snapshot:
        """Read all visible GPUs and the host, for monitoring, in a few milliseconds per GPU."""
        memory = psutil.virtual_memory()
        host = HostReading(
            total_gib=memory.total / GIB,
            available_gib=memory.available / GIB,
            process_gib=psutil.Process().memory_info().rss / GIB,
            cpu_percent=psutil.cpu_percent(),
        )
        return Snapshot({i: self._reader.reading(gpu.system_index) for i, gpu in enumerate(self._gpus)}, host)


def visible_gpus(
    gpus: Sequence[Gpu], visible_devices: str | None, device_order: str | None = None
) -> tuple[list[Gpu], list[str]]:
    """
    Return the GPUs that CUDA would show, in its order, and notes for the user; `gpus` are all, in the order of the PCI bus.

    CUDA's rule for `CUDA_VISIBLE_DEVICES`: indices or beginnings of UUIDs, up to the first entry that names no GPU (CUDA C++
    Programming Guide, "CUDA Environment Variables"). Without `CUDA_DEVICE_ORDER` the fastest GPU is first. MIG slices are
    left out.
    """
    if not gpus:
        return [], []
    chosen, notes = (list(gpus), []) if visible_devices is None else _named(gpus, visible_devices)
    if split := ", ".join(str(gpu.system_index) for gpu in chosen if gpu.is_split):
        notes.append(
            f"GPU(s) {split} of nvidia-smi are in MIG mode and left out: CUDA shows their slices, and training needs "
            "whole GPUs."
        )
    by_index = visible_devices is None or not visible_devices.strip().startswith("GPU-")
    kinds = {(gpu.name, gpu.total_gib, gpu.compute_capability) for gpu in gpus}
    if by_index and chosen and len(kinds) > 1 and device_order != "PCI_BUS_ID":
        notes.append(
            "The GPUs are of different kinds, so CUDA may count them in another order than is shown here. Set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID to make the orders equal."
        )
    return [gpu for gpu in chosen if not gpu.is_split], notes


def _named(gpus: Sequence[Gpu], value: str) -> tuple[list[Gpu], list[str]]:
    """Return the GPUs that a value of `CUDA_VISIBLE_DEVICES` names, up to the first entry that names none."""
    variable, named = f"CUDA_VISIBLE_DEVICES={value!r}", []
    by_uuid = value.strip().startswith("GPU-")
    if value.strip().startswith("MIG-"):
        return [], [f"{variable} names slices of GPUs (MIG); only whole GPUs are listed here."]
    for entry in map(str.strip, value.split(",")):
        if by_uuid:
            found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        else:  # CUDA reads the number that an entry begins with, and ignores what follows it
            number = re.match(r"\+?\d+", entry)
            found = gpus[int(number[0]) : int(number[0]) + 1] if number else []
        if len(found) != 1 and not named and entry in ("", "-1"):
            return [], [f"{variable} hides all {len(gpus)} GPU(s)."]
        if len(found) != 1:
            what = f"names none of the {len(gpus)} GPU(s), and CUDA ignores the rest: {len(named)} visible"
            return named, [f"{variable}: {entry!r} {what}."]
        if found[0] in named:
            return [], [f"{variable} names a GPU twice, so CUDA shows none. Name each GPU once."]
        named += found
    return named, []
