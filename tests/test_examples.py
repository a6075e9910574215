"""Each example, as its docstring says to run it; `advanced_config.py` is also in `test_config_manager.py`."""

import subprocess
import sys

import pytest

from .launching import ROOT, clean_environment, launch

EXAMPLES = ROOT / "examples"


@pytest.mark.launch
def test_a_loop_of_ones_own_trains_and_saves(tiny_model, tmp_path):
    finished = launch(EXAMPLES / "direct_trainer_usage.py", [tiny_model, tmp_path / "out"], processes=2)
    assert finished.status == 0, finished.output[-3000:]
    assert "after 4 steps of" in finished.output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoint" / "manifest.json").exists()


@pytest.fixture(scope="module")
def small_real_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "model"
    subprocess.run([sys.executable, EXAMPLES / "demo" / "make_model.py", folder], check=True, env=clean_environment())
    return folder


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("example", ["quick_start.py", "advanced_config.py", "direct_trainer_usage.py"])
def test_an_example_trains_the_small_real_model(example, small_real_model, tmp_path):
    finished = launch(EXAMPLES / example, [small_real_model, tmp_path / "out"], processes=2, timeout_s=400)
    assert finished.status == 0, finished.output[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.launch
def test_the_installation_is_verified():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "verify_installation.py"], capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
