"""The few calls of CUDA's runtime that memory between processes needs, through NVIDIA's `cuda-bindings`."""

import ctypes
from typing import Any

import torch

_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

_held = []  # all memory that was allocated here


class _CudaError(RuntimeError):
    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class _Region:
    """Memory as `torch.as_tensor` takes it. https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, pointer: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def allocated(nbytes: int, device: torch.device) -> torch.Tensor:
    """
    Return new memory of the driver's, of shape `(nbytes,)` and type `uint8`.

    Raises:
        torch.OutOfMemoryError: if the GPU has not as much, or a limit that was set for PyTorch does not allow it.
    """
    torch.cuda.empty_cache()  # what PyTorch keeps for later is free then
    with torch.cuda.device(device):
        _lower_limit_of_pytorch(nbytes, device)
        try:
            pointer = _checked(_runtime().cudaMalloc(nbytes))
        except _CudaError as error:
            raise _out_of_memory(nbytes, device) if error.number == _OUT_OF_MEMORY else error from None
        _held.append(torch.as_tensor(_Region(int(pointer), nbytes), device=device))
        return _held[-1]


def _lower_limit_of_pytorch(nbytes: int, device: torch.device) -> None:
    """Let memory that PyTorch does not know count against a limit that was set for it."""
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    if fraction < 1:
        left = fraction - nbytes / torch.cuda.mem_get_info(device)[1]
        if left <= 0:
            raise _out_of_memory(nbytes, device)
        torch.cuda.set_per_process_memory_fraction(left, device)


def _out_of_memory(nbytes: int, device: torch.device) -> torch.OutOfMemoryError:
    free, total = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    limit = f", and PyTorch's limit leaves {fraction * total / 2**30:.2f}" if fraction < 1 else ""
    earlier = (
        f", {held_bytes() / 2**30:.2f} are of frozen weights, also those of models that are gone" if _held else ""
    )
    return torch.OutOfMemoryError(
        f"{nbytes / 2**30:.2f} GiB of frozen weights do not fit {device}: of {total / 2**30:.1f} GiB {free / 2**30:.2f} are "
        f"free{earlier}{limit}. Use more GPUs, 4-bit weights, or ACCELERATE_UNSLOTH_FROZEN_WEIGHTS=host."
    )


def handle_of(region: torch.Tensor) -> str:
    """Return what another process opens the memory with, in hexadecimal."""
    handle = _checked(_runtime().cudaIpcGetMemHandle(region.data_ptr()))
    return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex()


def opened(handle: str, device: torch.device) -> int:
    """Return the address of another process's memory in this one; raise `RuntimeError` if the GPUs do not allow it."""
    runtime = _runtime()
    received = runtime.cudaIpcMemHandle_t()
    # cuda-bindings 13.3 has the bytes as an attribute, 13.5 does not.
    ctypes.memmove(received.getPtr(), bytes.fromhex(handle), _HANDLE_BYTES)
    with torch.cuda.device(device):  # peer access is of the current GPU
        return int(_checked(runtime.cudaIpcOpenMemHandle(received, runtime.cudaIpcMemLazyEnablePeerAccess)))


def copy(pointer: int, nbytes: int, target: torch.Tensor) -> None:
    """Copy bytes to the beginning of a tensor, on the current stream of its device."""
    runtime, stream = _runtime(), torch.cuda.current_stream(target.device).cuda_stream
    kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
    _checked(runtime.cudaMemcpyAsync(target.data_ptr(), pointer, nbytes, kind, stream))


def held_bytes() -> int:
    """Return the memory of this process's GPU that this module holds, for models that are gone too."""
    return sum(region.numel() for region in _held)


def _runtime():
    try:
        from cuda.bindings import runtime
    except ImportError as error:  # torch has it since 2.10
        raise ImportError(f"the package is missing: pip install cuda-bindings ({error})") from error
    return runtime


def _checked(result: tuple) -> Any:
    """Return the value of a call of CUDA's runtime, whose first result is its error."""
    error, *values = result
    if int(error):
        _runtime().cudaGetLastError()  # or PyTorch would take it for that of its next kernel
        raise _CudaError(f"CUDA error {int(error)} ({error.name})", int(error))
    return values[0] if values else None
