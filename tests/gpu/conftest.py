"""
Fixtures of the GPU tests: real Unsloth, real kernels, NCCL. Needs pytest and pynvml beside what the library needs.

    pytest tests/gpu                          everything; GPUS=2,3 chooses other GPUs than the first two
    pytest tests/gpu -k "moe or frozen"       only the cases of these tests, in one launch per number of processes
    pytest tests/gpu -m "not multi_gpu"       what one GPU can run

A launch that takes longer than LAUNCH_TIMEOUT_S (400 s) is ended, which fails the case it was in and those after it. Ctrl-C
ends all launches and shows what is done. `make demo` once makes the model they use; MODEL names another, and without either
it has random weights. What launches print is in `output.txt` below pytest's `--basetemp`.

A test marked with `cases(two="moe")` reads what that case returned in the launch of that name, see `cases/__init__.py`.
"""

import os

import pynvml
import pytest

from .cases import CASES
from .launches import Suite, visible_gpus

_SUITE = pytest.StashKey[Suite]()


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


def wanted_cases(items) -> dict[str, list[str]]:
    """The cases of tests that are not skipped, by launch."""
    wanted = {launch: [] for launch in CASES}
    marks = [item.get_closest_marker("cases") for item in items if not item.get_closest_marker("skip")]
    for mark in filter(None, marks):
        for launch, names in mark.kwargs.items():
            for name in [names] if isinstance(names, str) else names:
                assert name in CASES[launch], f"{name!r} is no case of {launch!r}"
                wanted[launch].append(name)
    return {launch: list(dict.fromkeys(names)) for launch, names in wanted.items()}


@pytest.fixture(scope="session")
def suite(request, tmp_path_factory):
    made = Suite(tmp_path_factory.mktemp("launches"), wanted_cases(request.session.items), visible_gpus(count_gpus()))
    request.config.stash[_SUITE] = made
    yield made
    made.close()


@pytest.fixture
def outcome(suite):
    """`outcome(launch, case, rank=0)`: what the case returned."""
    return suite.outcome


def pytest_terminal_summary(terminalreporter, config):
    if _SUITE in config.stash:
        terminalreporter.section("seconds by launch and case (the first case of a launch includes all imports)")
        for line in [*config.stash[_SUITE].times(), *config.stash[_SUITE].notes]:
            terminalreporter.line(line)
