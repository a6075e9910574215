"""Make a forked process what a fresh interpreter would be that starts a script."""

import os
import sys
from pathlib import Path

import numpy
import torch


def redirect(output: int) -> None:
    """Let standard output and error, which nothing has been written to yet, go to another file."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def set_environment(environment: dict[str, str]) -> None:
    warm_home = os.environ["HF_HOME"]
    os.environ.clear()
    os.environ.update(environment)
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    _move_home(warm_home, os.environ.get("HF_HOME", os.path.join(cache, "huggingface")))


def _move_home(warm: str, home: str) -> None:
    """Correct the folders that libraries have derived from `HF_HOME` when they were imported."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            # By type(), because isinstance() wakes up deprecated and lazy objects.
            if issubclass(type(value), (str, Path)) and str(value).startswith(warm):
                setattr(module, name, type(value)(home + str(value).removeprefix(warm)))


def run(script: list[str], environment: dict[str, str]) -> None:
    """Run a script with its arguments as `python script arguments`; its exceptions and its exit are the caller's."""
    set_environment(environment)
    _seed()
    file = script[0]
    sys.argv, sys.path[0] = list(script), os.path.dirname(os.path.abspath(file))
    namespace = vars(sys.modules["__main__"])  # the same module, because dill and others hold it already
    for name in set(namespace) - {"__name__", "__builtins__", "__loader__"}:
        del namespace[name]
    namespace |= {"__file__": file, **dict.fromkeys(["__spec__", "__doc__", "__package__", "__cached__"])}
    exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), namespace)


def _seed() -> None:
    """Seed from the system what a fresh process does: one rank must not draw what another draws by itself."""
    numpy.random.seed()  # Python's own generator does this after a fork
    # PyTorch 2.14 begins with a random seed; earlier ones everywhere with that of any new generator.
    if torch.initial_seed() != torch.Generator().initial_seed():
        torch.default_generator.seed()
