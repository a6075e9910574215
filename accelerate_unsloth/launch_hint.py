"""The command that runs this script on all GPUs, for someone who started it without a launcher."""

import os
import shlex
import sys

from . import configs
from .topology import topology


def command(num_processes: int, config: str = "unsloth_ddp") -> str:
    """
    The `accelerate launch` command for the running script and its arguments.

    Example:

    ```python
    >>> from accelerate_unsloth.launch_hint import command
    >>> command(4).startswith("accelerate launch --num_processes 4 --config_file ")
    True
    ```
    """
    words = ["accelerate", "launch", "--num_processes", str(num_processes), "--config_file", str(configs.path(config))]
    return shlex.join([*words, *script()])


def script() -> list[str]:
    """The running script, or `-m` and the running module, with its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return sys.argv if spec is None else ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def needed(num_processes: int, visible_gpus: int) -> str:
    """What to say to someone who asked for `num_processes` and started one."""
    where = "" if visible_gpus else " as a dry run on the CPU, because no GPU is visible"
    config = "unsloth_ddp" if visible_gpus else "unsloth_ddp_cpu"
    return (
        f"accelerate_unsloth: num_gpus={num_processes} takes {num_processes} processes, and this script was started as "
        f"1. Start it with{where}:\n  {command(num_processes, config)}"
    )


def show(visible_gpus: int) -> None:
    """Say in one line how to use all GPUs, if this process uses one of several and no launcher started it."""
    if visible_gpus > 1 and topology().world_size == 1 and "RANK" not in os.environ:
        print(f"accelerate_unsloth: training on 1 of {visible_gpus} GPUs; to use all: {command(visible_gpus)}")
