"""Each example, as its docstring says to start it, with Unsloth itself: `pytest tests/gpu/test_examples.py -m slow`."""

import os
from pathlib import Path

import pytest

from ..launch.test_examples import STARTS, copy_examples, of_each_example, start_without_arguments
from ..launching import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the examples with the model in MODEL or that of `make demo`; without either the first start makes it."""
    model = Path(os.environ.get("MODEL", ROOT / ".demo" / "model")).absolute()
    return copy_examples(tmp_path_factory.mktemp("examples"), model if model.is_dir() else None)


@pytest.mark.parametrize(
    "start",
    [pytest.param(start, marks=pytest.mark.multi_gpu if STARTS[start]["processes"] > 1 else ()) for start in STARTS],
)
@of_each_example
def test_an_example_trains_without_arguments_on_gpus(example, start, folder):
    environment = {
        "CUDA_VISIBLE_DEVICES": os.environ.get("GPUS", "0,1"),
        "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"),
        "HF_HOME": str(folder / "cache"),
    }
    start_without_arguments(folder, example, start, environment=environment, config="unsloth_ddp", timeout_s=400)
