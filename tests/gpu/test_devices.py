"""What NVML says against what CUDA says, and the installation check on real GPUs."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from accelerate_unsloth import DeviceManager
from accelerate_unsloth.commands.env import can_train, checks

from ..launching import ROOT, clean_environment

pytestmark = pytest.mark.gpu

ASK_CUDA = """
import json, torch
gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(json.dumps([[g.name, [g.major, g.minor], "GPU-" + str(g.uuid)] for g in gpus]))
"""

VISIBLE = [None, "0", "1,0", "0,99", "-1", "first uuid"]


def ask(words, visible):
    """Run Python with other visible GPUs than this process, which sees none."""
    environment = clean_environment({"CUDA_VISIBLE_DEVICES": visible})
    if visible is None:
        del environment["CUDA_VISIBLE_DEVICES"]
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500
    )


def manager(visible):
    return DeviceManager(environment={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


def named(visible):
    return manager(None).get_available_devices()[0].uuid if visible == "first uuid" else visible


@pytest.fixture(scope="module")
def shown_by_cuda():
    """What processes with different visible GPUs see, all asked at once because each of them imports PyTorch."""
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda visible: ask(["-c", ASK_CUDA], named(visible)), VISIBLE)
        return {visible: json.loads(process.stdout) for visible, process in zip(VISIBLE, done, strict=True)}


@pytest.mark.parametrize("visible", VISIBLE)
def test_nvml_and_cuda_show_the_same_gpus_in_the_same_order(visible, shown_by_cuda):
    devices = manager(named(visible)).get_available_devices()
    found = [[device.name, list(device.compute_capability), device.uuid] for device in devices]
    assert found == shown_by_cuda[visible]


def test_readings_are_sensible():
    devices, snapshot = manager(None), manager(None).snapshot()
    for device in devices.get_available_devices():
        reading = snapshot.gpus[device.index]
        assert 0 < device.free_gib <= device.total_gib == reading.total_gib
        assert 0 <= reading.utilisation_percent <= 100
        assert 0 < reading.temperature_c < 120
        assert 0 < reading.power_w < 2000
        assert "?" not in device.links.values()
    assert can_train(checks.check_gpus(devices.get_available_devices(), devices.notes, devices.driver))


@pytest.mark.launch
@pytest.mark.slow
def test_the_installation_check_passes_on_all_gpus():
    visible = os.environ.get("GPUS")
    done = ask(["-c", "from accelerate_unsloth.commands import app; app()", "test"], visible)
    assert done.returncode == 0, done.stdout + done.stderr
