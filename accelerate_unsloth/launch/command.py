"""Check that this launch has as many processes as the script asks for, and show the command for it."""

import os
import shlex
import sys
from collections.abc import Sequence

from ..plugin import is_count
from . import configs
from .topology import topology

# The module that runs the script, for `python -m MODULE script.py`; the script cannot find out by itself.
run_through: str | None = None

_KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
# No file that a launcher could start: `python -c`, an interactive session, standard input, a notebook's kernel.
_NO_SCRIPT = ("-c", "", "-", *_KERNELS)


def command(num_processes: int, config: str = "unsloth_ddp", of: Sequence[str] | None = None) -> str:
    """Return the `accelerate launch` command for a script and its arguments, by default the running ones."""
    words = ["accelerate", "launch", "--num_processes", str(num_processes), "--config_file", str(configs.path(config))]
    return shlex.join([*words, *(script() if of is None else of)])


def script() -> list[str]:
    """Return the running script, or `-m` and the running module, with its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and (spec.name == "__main__" or spec.origin != os.path.realpath(sys.argv[0])):
        spec = None  # a folder or archive, or a script that another module runs, such as cProfile
    if run_through is not None and (spec is None or spec.name.removesuffix(".__main__") != run_through):
        return ["-m", run_through, *sys.argv]
    return sys.argv if spec is None else ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def is_a_file() -> bool:
    """Return whether this process runs a script or module."""
    return os.path.basename(script()[0]) not in _NO_SCRIPT


def is_kernel() -> bool:
    """Return whether this process is the kernel of a notebook, or was forked from one."""
    return os.path.basename(script()[0]) in _KERNELS


def show(visible_gpus: int) -> None:
    """Print how to use all GPUs, if this process uses one of several and no launcher started it."""
    if visible_gpus <= 1 or topology().world_size > 1 or "RANK" in os.environ:
        return
    use_all = command(visible_gpus, of=None if is_a_file() else ["train.py"])
    if is_kernel():
        use_all = f"restart the kernel, and {_in_a_notebook(visible_gpus)}"
    print(f"accelerate_unsloth: training on 1 of {visible_gpus} GPUs; to use all: {use_all}")


def _in_a_notebook(num_processes: int) -> str:
    return (
        "put everything from the imports to the training into a function train(), and call "
        f"accelerate.notebook_launcher(train, num_processes={num_processes})"
    )


def check_launch(num_gpus: int | None, world_size: int, launched: bool, visible_gpus: int) -> bool:
    """
    Return whether this process can go on; if not, a launcher has to start the script. `num_gpus=None` accepts any launch.

    Raises:
        ValueError: for a launch of another size, or fewer visible GPUs than asked for.
    """
    if num_gpus is None:
        return True
    if launched and num_gpus != world_size:
        raise ValueError(
            f"num_gpus={num_gpus} was asked for, but this launch has {world_size} process(es). Launch with "
            f"--num_processes {num_gpus}, or leave num_gpus out to accept the launch as it is."
        )
    if not launched and 0 < visible_gpus < num_gpus:
        raise ValueError(
            f"num_gpus={num_gpus} was asked for, but {visible_gpus} GPU(s) are visible. Ask for {visible_gpus}, or "
            "make more visible with CUDA_VISIBLE_DEVICES."
        )
    return launched or num_gpus == 1


def require(num_gpus: int | None, visible_gpus: int) -> None:
    """
    Go on if this launch has `num_gpus` processes.

    Raises:
        ValueError: for a launch of another size, or fewer visible GPUs than asked for.
        SystemExit: with status 2 and the command to type, if no launcher started this process.
    """
    if num_gpus is not None and not is_count(num_gpus):
        raise ValueError(f"num_gpus={num_gpus!r} is not a whole number of at least 1. Give one, or leave it out.")
    launched = topology().world_size > 1 or "RANK" in os.environ
    if check_launch(num_gpus, topology().world_size, launched, visible_gpus):
        return
    if is_kernel():
        print(
            f"accelerate_unsloth: num_gpus={num_gpus} needs {num_gpus} processes, and this notebook's kernel is 1. To train "
            f"on all, {_in_a_notebook(num_gpus)}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    config, where = "unsloth_ddp", ""
    if not visible_gpus:
        config, where = "unsloth_ddp_cpu", " as a dry run on the CPU, because no GPU is visible,"
    began, of = f"script was started as 1. Start it{where} with:", None
    if not is_a_file():
        began = (
            f"code runs as 1, from no file that a launcher could start. Save it as train.py, and start it{where} with:"
        )
        of = ["train.py"]
    print(
        f"accelerate_unsloth: num_gpus={num_gpus} needs {num_gpus} processes, and this {began}\n"
        f"  {command(num_gpus, config, of)}",
        file=sys.stderr,
    )
    raise SystemExit(2)
