"""Fixtures: the tiny model and data, made once."""

import os
import signal

import pytest

from .launching import WORKERS, clean_environment, launch

# The suite itself never touches a GPU, a hub or a launcher's leftovers.
for name in set(os.environ) - set(clean_environment()):
    del os.environ[name]
os.environ.update(clean_environment())

# A shell starts what it puts into the background with Ctrl-C ignored, and every process of the suite would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from . import tiny

    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def uneven_data(tmp_path_factory):
    """22 samples: not a multiple of any effective batch used in the tests."""
    from . import tiny

    return tiny.make_data(tmp_path_factory.mktemp("data") / "uneven.jsonl", samples=22)


@pytest.fixture(scope="session")
def unsloth_once(tiny_model, uneven_data, tmp_path_factory):
    """The folder with all that one import of the real Unsloth has left, see `workers/unsloth_once.py`."""
    from . import tiny

    folder, experts = tmp_path_factory.mktemp("unsloth"), tiny.make_mixture_of_experts(tmp_path_factory.mktemp("moe"))
    environment = {"HF_HOME": str(folder / "cache"), "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes minutes, for a model that trains in a second
    arguments = [tiny_model, experts, uneven_data, folder]
    finished = launch(WORKERS / "unsloth_once.py", arguments, 1, environment, timeout_s=300, real_launcher=True)
    assert finished.status == 0, finished.output[-4000:]
    return folder
