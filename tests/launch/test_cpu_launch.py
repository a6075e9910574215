"""Processes of a launch without GPUs know of each other, also in scripts that make a plain `Accelerator`."""

import pytest

from ..launching import launch

IMPORTED_FIRST = "import accelerate_unsloth\nfrom accelerate import Accelerator\naccelerator = Accelerator()\n"
IMPORTED_LATE = "from accelerate import Accelerator\naccelerator = Accelerator()\nimport accelerate_unsloth\n"
# In one call, which the lines of two processes cannot be mixed up in.
SAY = "import os\nos.write(1, f'{accelerator.distributed_type.value} {accelerator.num_processes} {accelerator.device}\\n'.encode())\n"


@pytest.fixture
def script(tmp_path):
    def write(text):
        file = tmp_path / "script.py"
        file.write_text(text + SAY)
        return file

    return write


@pytest.mark.launch
def test_a_plain_accelerator_knows_all_processes_of_the_bundled_cpu_file(script):
    finished = launch(script(IMPORTED_FIRST), processes=2)
    assert finished.status == 0, finished.output[-3000:]
    assert finished.output.count("MULTI_CPU 2 cpu\n") == 2, finished.output


@pytest.mark.launch
def test_torchrun_without_gpus_is_no_different(script):
    finished = launch(script(IMPORTED_FIRST), processes=2, torchrun=True)
    assert finished.status == 0, finished.output[-3000:]
    assert finished.output.count("MULTI_CPU 2 cpu\n") == 2, finished.output


@pytest.mark.launch
def test_an_accelerator_made_too_early_ends_with_the_fix(script):
    finished = launch(script(IMPORTED_LATE), processes=2)
    assert finished.status != 0
    assert "The launcher started 2 processes without GPUs" in finished.output
    assert "Import accelerate_unsloth first" in finished.output


@pytest.mark.launch
def test_a_single_process_is_left_alone(script):
    finished = launch(
        script(IMPORTED_FIRST + "assert 'ACCELERATE_USE_CPU' not in __import__('os').environ\n"), processes=1
    )
    assert finished.status == 0, finished.output[-3000:]
    assert "NO 1" in finished.output
