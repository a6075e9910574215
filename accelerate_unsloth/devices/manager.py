"""The GPUs that this process may use, and readings of them and of the host. CUDA is never started."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import visibility
from .nvml import Gpu, GpuProcess, GpuReading, NvmlReader

_GIB = 2**30
_FIRST_WITH_BF16 = (8, 0)


@dataclass(frozen=True)
class Device:
    """
    One visible GPU.

    Args:
        index (`int`): Its number in CUDA, as in `cuda:0`.
        system_index (`int`): Its number in `nvidia-smi`.
        uuid (`str`): Its name for `CUDA_VISIBLE_DEVICES` that means the same in every process.
        name (`str`): Its model.
        total_gib (`float`): Memory.
        free_gib (`float`): Memory that nobody held when it was read.
        compute_capability (`tuple[int, int]`): Such as `(9, 0)`.
        bf16 (`bool`): Whether it computes in bfloat16.
        links (`dict[int, str]`): By index of another visible GPU, the way to it: see [`NvmlReader.link`].
        processes (`tuple[GpuProcess, ...]`): Who holds memory on it.
    """

    index: int
    system_index: int
    uuid: str
    name: str
    total_gib: float
    free_gib: float
    compute_capability: tuple[int, int]
    bf16: bool
    links: dict[int, str] = field(default_factory=dict, hash=False)
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class HostReading:
    """Memory of the machine and of this process, and how busy the CPU was since the reading before."""

    total_gib: float
    available_gib: float
    process_gib: float
    cpu_percent: float


@dataclass(frozen=True)
class Snapshot:
    """The readings of one moment; `gpus` goes by CUDA's index."""

    gpus: dict[int, GpuReading] = field(hash=False)
    host: HostReading


class DeviceManager:
    """
    What this process can see: GPUs through NVML, the host through psutil.

    Args:
        reader ([`NvmlReader`], *optional*):
            Where GPUs are read from.
        environment (`Mapping[str, str]`, *optional*):
            Where `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` are read from, once.

    `notes` holds what a user should know: why there is no GPU, or which ones are kept out.

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
        # Looked up at each call: `datasets.map(num_proc=2)` replaces `os.environ` by a copy (datasets 4.8, arrow_dataset.py).
        environment = os.environ if environment is None else environment
        import psutil

        self._reader = NvmlReader() if reader is None else reader
        visible = visibility.resolve(
            self._reader.gpus, environment.get("CUDA_VISIBLE_DEVICES"), environment.get("CUDA_DEVICE_ORDER")
        )
        self._gpus, self.notes = visible.gpus, (*self._reader.notes, *visible.notes)
        self.driver: str | None = self._reader.driver
        psutil.cpu_percent()  # the first call has nothing to compare with

    def get_available_devices(self) -> list[Device]:
        """
        The visible GPUs as they are now, in CUDA's order; an empty list without GPUs, and `notes` says why.

        Returns:
            `list[Device]`
        """
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
        Choose the GPUs with the most free memory.

        Args:
            num_gpus (`int`):
                How many.
            min_free_gib (`float`, *optional*, defaults to `0.0`):
                Free memory that each of them has to have, in GiB.

        Returns:
            `list[Device]`: in CUDA's order.

        Raises:
            ValueError: if there are not as many, with both numbers and the free memory of each GPU.

        Example:

        ```python
        >>> import os
        >>> from accelerate_unsloth import DeviceManager
        >>> devices = DeviceManager()
        >>> if len(devices.get_available_devices()) >= 2:
        ...     os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in devices.select(2, min_free_gib=20))
        ```
        """
        try:
            return freest(self.get_available_devices(), num_gpus, min_free_gib)
        except ValueError as error:
            raise ValueError(" ".join([str(error), *self.notes])) from None

    def snapshot(self) -> Snapshot:
        """
        Read all visible GPUs and the host, for monitoring: a few milliseconds a GPU, no CUDA.

        Returns:
            [`Snapshot`]
        """
        import psutil

        memory = psutil.virtual_memory()
        host = HostReading(
            total_gib=memory.total / _GIB,
            available_gib=memory.available / _GIB,
            process_gib=psutil.Process().memory_info().rss / _GIB,
            cpu_percent=psutil.cpu_percent(),
        )
        return Snapshot({i: self._reader.reading(gpu.system_index) for i, gpu in enumerate(self._gpus)}, host)


def freest(devices: Sequence[Device], num_gpus: int, min_free_gib: float = 0.0) -> list[Device]:
    """
    The `num_gpus` of `devices` with the most free memory, in their own order; of two with the same, the first.

    Raises:
        ValueError: if fewer have `min_free_gib`, or `num_gpus` is not at least 1.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus={num_gpus!r} is not a number of GPUs. Ask for at least 1.")
    enough = [device for device in devices if device.free_gib >= min_free_gib]
    if len(enough) < num_gpus:
        free = ", ".join(f"cuda:{device.index} {device.free_gib:.1f}" for device in devices) or "none"
        raise ValueError(
            f"num_gpus={num_gpus} with min_free_gib={min_free_gib} was asked for, but {len(enough)} of "
            f"{len(devices)} visible GPU(s) have that much free memory (GiB: {free}). Ask for fewer GPUs or less "
            "memory, end what holds it, or make more GPUs visible with CUDA_VISIBLE_DEVICES."
        )
    return sorted(sorted(enough, key=lambda device: -device.free_gib)[:num_gpus], key=lambda device: device.index)
