"""All rows in one call of PyTorch's varlen attention, against the same rows one by one."""

import json
import os
import subprocess
import sys

import pytest

from ..launching import ROOT, clean_environment

pytestmark = [pytest.mark.gpu, pytest.mark.unsloth]

BF16_ROUNDING = 1e-2


def test_rows_in_one_call_give_the_output_and_gradients_of_rows_one_by_one(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("GPUS", "0")}
    environment |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.varlen"],
        capture_output=True,
        text=True,
        env=clean_environment(environment),
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if not found.pop("spare"):
        pytest.skip("only PyTorch 2.11 has a varlen attention that Unsloth does not take")
    assert found.pop("restored")
    for window, differences in found.items():
        assert differences.pop("calls") == 1, window
        assert all(difference < BF16_ROUNDING for difference in differences.values()), (window, differences)
