"""Fixtures: the tiny model and data, made once."""

import os
import signal

import pytest

from .launching import clean_environment

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
