"""Fixtures: the tiny model and data, made once."""

import os
import signal

import pytest

from accelerate_unsloth.testing import tiny_model as tiny_model_files

from .launching import WORKERS, clean_environment, launch

# The suite itself never touches a GPU, a hub or a launcher's leftovers.
for name in set(os.environ) - set(clean_environment()):
    del os.environ[name]
os.environ.update(clean_environment())

# A shell starts what it puts into the background with Ctrl-C ignored, and every process of the suite would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return tiny_model_files.make_model("tiny", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def uneven_data(tmp_path_factory):
    """22 samples: not a multiple of any effective batch used in the tests."""
    return tiny_model_files.make_prompts(tmp_path_factory.mktemp("data") / "uneven.jsonl", samples=22)


@pytest.fixture(scope="session")
def preference_data(tmp_path_factory):
    """As many pairs of a chosen and a rejected answer."""
    return tiny_model_files.make_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl", samples=22)


@pytest.fixture(scope="session")
def unsloth_once(tiny_model, uneven_data, preference_data, tmp_path_factory):
    """The folder with all that one import of the real Unsloth has left, see `workers/unsloth_once.py`."""
    folder = tmp_path_factory.mktemp("unsloth")
    experts = tiny_model_files.make_mixture_of_experts(tmp_path_factory.mktemp("moe"))
    environment = {"HF_HOME": str(folder / "cache"), "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes minutes, for a model that trains in a second
    arguments = [tiny_model, experts, uneven_data, preference_data, folder]
    finished = launch(WORKERS / "unsloth_once.py", arguments, 1, environment, timeout_s=300, real_launcher=True)
    assert finished.status == 0, finished.output[-4000:]
    return folder
