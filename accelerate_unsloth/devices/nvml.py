"""
Read the GPUs of this node through NVIDIA's management library (NVML).

NVML creates no CUDA context, so it can be asked before each process has selected its GPU. It ignores
`CUDA_VISIBLE_DEVICES`, which `manager.py` applies.
"""

from dataclasses import dataclass
from typing import Any

import psutil

GIB = 2**30
_PCIE_LINKS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}  # by NVML_TOPOLOGY_*


@dataclass(frozen=True)
class Gpu:
    """What does not change of a GPU; `system_index` is its number in `nvidia-smi`."""

    system_index: int
    uuid: str
    name: str
    total_gib: float
    compute_capability: tuple[int, int]
    is_split: bool = False  # in MIG mode, where CUDA shows its slices instead


@dataclass(frozen=True)
class GpuReading:
    """What changes of a GPU; `None` if the GPU does not report it."""

    total_gib: float
    free_gib: float
    utilisation_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU; inside a container `pid` is the host's number."""

    pid: int
    used_gib: float | None


class NvmlReader:
    """
    Read GPUs by their `system_index`. Without a driver `gpus` is empty, and `notes` says why.

    Another object with the same attributes and methods may replace it.
    """

    def __init__(self):
        self.gpus: tuple[Gpu, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.driver: str | None = None  # its version, and the newest CUDA version it supports
        self._handles: dict[int, Any] = {}
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            self.notes = ("No GPU: NVIDIA's driver is not installed on this machine.",)
        except pynvml.NVMLError as error:
            self.notes = (f"No GPU: NVIDIA's driver does not answer ({error}).",)
        else:
            self._find_gpus()

    def _find_gpus(self) -> None:
        nvml = self._nvml
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        self.driver = f"{nvml.nvmlSystemGetDriverVersion()}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
        for index in range(nvml.nvmlDeviceGetCount()):
            self._add(index)
        if not self.gpus and not self.notes:
            self.notes = ("No GPU: the driver shows none.",)

    def _add(self, index: int) -> None:
        try:
            self._handles[index] = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self.gpus += (self._describe(index),)
        except self._nvml.NVMLError as error:
            self.notes += (f"GPU {index} of nvidia-smi does not answer ({error}) and is left out.",)

    def _describe(self, index: int) -> Gpu:
        nvml, handle = self._nvml, self._handles[index]
        mig_mode = self._optional(nvml.nvmlDeviceGetMigMode, handle)
        return Gpu(
            system_index=index,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            total_gib=self.reading(index).total_gib,
            compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            is_split=mig_mode is not None and mig_mode[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        )

    def reading(self, index: int) -> GpuReading:
        """Return memory, utilisation, temperature and power of one GPU, now."""
        nvml, handle = self._nvml, self._handles[index]
        memory = self._optional(nvml.nvmlDeviceGetMemoryInfo, handle)
        host = psutil.virtual_memory()  # is the memory of a GPU without its own, such as a GB10
        utilisation = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._optional(nvml.nvmlDeviceGetPowerUsage, handle)
        return GpuReading(
            total_gib=(memory or host).total / GIB,
            free_gib=(memory.free if memory else host.available) / GIB,
            utilisation_percent=None if utilisation is None else utilisation.gpu,
            temperature_c=self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if milliwatts is None else milliwatts / 1000,
        )

    def processes(self, index: int) -> tuple[GpuProcess, ...]:
        """Return the processes that compute on one GPU."""
        found = self._optional(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handles[index]) or []
        return tuple(GpuProcess(p.pid, None if p.usedGpuMemory is None else p.usedGpuMemory / GIB) for p in found)

    def link(self, one: int, other: int) -> str:
        """Return `"NVLink"`, the PCIe path as in `nvidia-smi topo` (`"PIX"` is near, `"SYS"` far), or `"?"` if unknown."""
        nvml, pair = self._nvml, (self._handles[one], self._handles[other])
        status = self._optional(nvml.nvmlDeviceGetP2PStatus, *pair, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == nvml.NVML_P2P_STATUS_OK:
            return "NVLink"
        return _PCIE_LINKS.get(self._optional(nvml.nvmlDeviceGetTopologyCommonAncestor, *pair), "?")

    def _optional(self, call, *arguments):
        """Return the result of `call`, or `None` if this GPU or driver does not support it."""
        nvml = self._nvml
        absent = (nvml.NVMLError_NotSupported, nvml.NVMLError_InvalidArgument, nvml.NVMLError_FunctionNotFound)
        try:
            return call(*arguments)
        except (*absent, nvml.NVMLError_NoPermission):
            return None
