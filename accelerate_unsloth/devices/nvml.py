"""
The GPUs of this machine as NVIDIA's management library (NVML) tells of them.

NVML starts no CUDA context, so it may be asked before each process has taken its own GPU. It knows nothing of
`CUDA_VISIBLE_DEVICES`: see `visibility`. Everything that talks to the driver is in [`NvmlReader`].
"""

from dataclasses import dataclass
from typing import Any

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What does not change: `system_index` is the number that `nvidia-smi` shows."""

    system_index: int
    uuid: str
    name: str
    total_gib: float
    compute_capability: tuple[int, int]
    is_split: bool = False  # in MIG mode, where CUDA shows slices of it instead


@dataclass(frozen=True)
class GpuReading:
    """What changes; `None` where a GPU does not tell."""

    total_gib: float
    free_gib: float
    utilisation_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU; inside a container its number is that of the host."""

    pid: int
    used_gib: float | None


class NvmlReader:
    """
    Reads GPUs by their `system_index`. Without a driver there are none, and `notes` says why.

    Another object with the same attributes and methods may take its place.
    """

    def __init__(self):
        self.gpus: tuple[Gpu, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.driver: str | None = None  # its version, and the newest CUDA it runs
        self._handles: dict[int, Any] = {}
        try:
            import pynvml
        except ImportError:
            self.notes = ("No GPU can be looked for: install the package nvidia-ml-py.",)
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            self.notes = ("No GPU: NVIDIA's driver is not installed on this machine.",)
        except pynvml.NVMLError as error:
            self.notes = (f"No GPU: NVIDIA's driver does not answer ({error}).",)
        else:
            self._look_around()

    def _look_around(self) -> None:
        nvml, notes = self._nvml, []
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        self.driver = f"{nvml.nvmlSystemGetDriverVersion()}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
        for index in range(nvml.nvmlDeviceGetCount()):
            notes += self._add(index)
        self.notes = tuple(notes) if self.gpus or notes else ("No GPU: the driver shows none.",)

    def _add(self, index: int) -> list[str]:
        """Take up one GPU; a note if it does not answer."""
        try:
            self._handles[index] = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self.gpus += (self._describe(index),)
        except self._nvml.NVMLError as error:
            return [f"GPU {index} of nvidia-smi does not answer ({error}) and is left out."]
        return []

    def _describe(self, index: int) -> Gpu:
        nvml, handle = self._nvml, self._handles[index]
        mig_mode = self._optional(nvml.nvmlDeviceGetMigMode, handle)
        return Gpu(
            system_index=index,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            total_gib=self._memory(handle)[0],
            compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            is_split=mig_mode is not None and mig_mode[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        )

    def reading(self, index: int) -> GpuReading:
        """Memory, utilisation, temperature and power of one GPU, now."""
        nvml, handle = self._nvml, self._handles[index]
        utilisation = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._optional(nvml.nvmlDeviceGetPowerUsage, handle)
        total_gib, free_gib = self._memory(handle)
        return GpuReading(
            total_gib=total_gib,
            free_gib=free_gib,
            utilisation_percent=None if utilisation is None else utilisation.gpu,
            temperature_c=self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if milliwatts is None else milliwatts / 1000,
        )

    def processes(self, index: int) -> tuple[GpuProcess, ...]:
        """Who computes on one GPU."""
        found = self._optional(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handles[index]) or []
        return tuple(GpuProcess(p.pid, None if p.usedGpuMemory is None else p.usedGpuMemory / _GIB) for p in found)

    def link(self, one: int, other: int) -> str:
        """
        How two GPUs reach each other, in the words of `nvidia-smi topo`.

        Returns:
            `str`: `"NV18"` for 18 NVLinks; else over PCIe, from near to far: `"PIX"`, `"PXB"`, `"PHB"`, `"NODE"`,
            `"SYS"`; `"?"` if the driver does not tell.
        """
        nvml, first, second = self._nvml, self._handles[one], self._handles[other]
        linked = self._optional(nvml.nvmlDeviceGetP2PStatus, first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if linked == nvml.NVML_P2P_STATUS_OK:
            return f"NV{self._count_nvlinks(first, second)}"
        level = self._optional(nvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
        words = {
            nvml.NVML_TOPOLOGY_INTERNAL: "PIX",
            nvml.NVML_TOPOLOGY_SINGLE: "PIX",
            nvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
            nvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
            nvml.NVML_TOPOLOGY_NODE: "NODE",
            nvml.NVML_TOPOLOGY_SYSTEM: "SYS",
        }
        return words.get(level, "?")

    def _count_nvlinks(self, first, second) -> int:
        """Links that lead to the other GPU, or to a switch, through which they all do."""
        nvml, bus_id, count = self._nvml, self._nvml.nvmlDeviceGetPciInfo(second).busId, 0
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            if self._optional(nvml.nvmlDeviceGetNvLinkState, first, link) != nvml.NVML_FEATURE_ENABLED:
                continue
            kind = self._optional(nvml.nvmlDeviceGetNvLinkRemoteDeviceType, first, link)
            remote = self._optional(nvml.nvmlDeviceGetNvLinkRemotePciInfo, first, link)
            leads_to_switch = kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
            count += leads_to_switch or (remote is not None and remote.busId == bus_id)
        return count

    def _memory(self, handle) -> tuple[float, float]:
        memory = self._optional(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is None:  # a GPU without memory of its own shares the host's
            import psutil

            host = psutil.virtual_memory()
            return host.total / _GIB, host.available / _GIB
        return memory.total / _GIB, memory.free / _GIB

    def _optional(self, call, *arguments):
        """What `call` gives, or `None` where this GPU or driver does not have it."""
        absent = (
            self._nvml.NVMLError_NotSupported,
            self._nvml.NVMLError_InvalidArgument,
            self._nvml.NVMLError_FunctionNotFound,
            self._nvml.NVMLError_NoPermission,
        )
        try:
            return call(*arguments)
        except absent:
            return None
