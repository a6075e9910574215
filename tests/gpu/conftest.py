"""Fixtures of the GPU tests: real Unsloth, real kernels, NCCL. `make demo` once makes the model they use."""

import os

import pynvml
import pytest

from ..launching import ROOT


def count_gpus() -> int:
    """From NVML, because the suite hides the GPUs from its own process."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def pytest_collection_modifyitems(items):
    gpus = count_gpus()
    for item in items:
        if "tests/gpu" in str(item.path).replace(os.sep, "/") and gpus < (2 if "multi_gpu" in item.keywords else 1):
            item.add_marker(pytest.mark.skip(reason=f"{gpus} GPU(s) visible"))


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct, or the folder in MODEL."""
    folder = os.environ.get("MODEL", str(ROOT / ".demo" / "model"))
    if not os.path.isdir(folder):
        pytest.skip("run `make demo` once, or name a model folder in MODEL")
    return folder
