"""The side of the warm process: import, and fork a process for each launch."""

import gc
import os
import sys
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from . import fresh, ranks

# What the workers end up with, including what transformers and trl import on first use only. Nothing is called, and
# no tensor is made, because threads do not survive a fork.
_HEAVY = (
    "accelerate.commands.launch",
    "datasets",
    "peft",
    "safetensors.torch",
    "tokenizers",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
)


def main() -> None:
    before = dict(os.environ)
    for name in _HEAVY:
        import_module(name)
    set_by_imports = dict(os.environ.items() - before.items())
    gc.freeze()  # or the first collection of each forked process would touch, and so copy, all of their memory
    request = _serve(Connection(int(sys.argv[1])))
    if request is not None:
        script, launcher, processes, environment, output = request
        _run(script, launcher, processes, environment | set_by_imports, output)


def _serve(connection: Connection):
    """Fork for each request; returns the request in the forked process, and nothing here when the tests have ended."""
    connection.send("warm")
    while True:
        try:
            request, output = connection.recv(), recv_handle(connection)
        except EOFError:
            return None
        pid = os.fork()
        if pid == 0:
            connection.close()
            return *request, output
        os.close(output)
        connection.send(pid)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _run(script: list[str], launcher: list[str], processes: int, environment: dict[str, str], output: int) -> None:
    os.setsid()
    fresh.redirect(output)
    if processes == 1:
        return fresh.run(script, environment)
    rank = ranks.fork(processes)
    if rank is None:
        fresh.set_environment(environment)
        return ranks.supervise([*launcher, *script])
    return fresh.run(*rank)
