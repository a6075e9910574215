"""Make a forked process what a fresh interpreter would be that starts a script, or a launcher of some."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import NoReturn

_SEVERAL = "--max_restarts"


def run(script: list[str], launcher: list[str], processes: int, environment, folder: str, output) -> None:
    """Run what a test wants to start; never returns."""
    from . import preload, ranks

    multiprocessing.set_start_method(None, force=True)  # or workers of a loader would be started by a fork server too
    os.setsid()
    os.chdir(folder)
    for descriptor in (1, 2):  # nothing has been written to them yet
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout.reconfigure(write_through=True)
    environment = environment | preload.SET_BY_IMPORTS
    if processes == 1:
        end_with(lambda: _run_script(script, environment))
    attempts = 1 + int(launcher[launcher.index(_SEVERAL) + 1]) if _SEVERAL in launcher else 1
    rank = ranks.fork(processes * attempts)
    if rank is None:
        _set_environment(environment)
        end_with(lambda: ranks.supervise([*launcher, *script]))
    end_with(lambda: _run_script(*rank, "-u"))


def end_with(function) -> NoReturn:
    """Call `function`, and end this process as an interpreter ends: hooks, threads, `atexit`, status."""
    status, interrupted = 0, False
    try:
        function()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def _run_script(script: list[str], environment: dict[str, str], *options: str) -> None:
    """Run a script as `python script arguments`, or a module as `python -m module arguments`."""
    from . import preload

    _set_environment(environment)
    _seed()
    sys.modules["__main__"], sys.orig_argv = preload.MAIN, [sys.executable, *options, *script]
    if script[0] == "-m":
        sys.argv, sys.path = script[1:], [os.getcwd(), *preload.PATH[1:]]
        runpy.run_module(script[1], run_name="__main__", alter_sys=True)
        return
    file = script[0]
    sys.argv, sys.path = list(script), [os.path.dirname(os.path.abspath(file)), *preload.PATH[1:]]
    namespace = vars(preload.MAIN)
    for name in set(namespace) - {"__name__", "__builtins__", "__loader__"}:
        del namespace[name]
    namespace |= {"__file__": file, **dict.fromkeys(["__spec__", "__doc__", "__package__", "__cached__"])}
    exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), namespace)


def _set_environment(environment: dict[str, str]) -> None:
    server_home = os.environ["HF_HOME"]
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it is found once, in `TMPDIR`
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    _move_home(server_home, os.environ.get("HF_HOME", os.path.join(cache, "huggingface")))


def _move_home(old: str, new: str) -> None:
    """Correct the folders that libraries have derived from `HF_HOME` when they were imported."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            # By type(), because isinstance() wakes up deprecated and lazy objects.
            if issubclass(type(value), (str, Path)) and str(value).startswith(old):
                setattr(module, name, type(value)(new + str(value).removeprefix(old)))


def _seed() -> None:
    """Seed from the system what a fresh process does: one rank must not draw what another draws by itself."""
    import numpy
    import torch

    numpy.random.seed()  # Python's own generator does this after a fork
    # PyTorch 2.14 begins with a random seed; earlier ones everywhere with that of any new generator.
    if torch.initial_seed() != torch.Generator().initial_seed():
        torch.default_generator.seed()
