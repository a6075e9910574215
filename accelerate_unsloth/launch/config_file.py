"""Accelerate configuration files made to measure: checked, written, and read back by Accelerate itself."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_PRECISIONS = ("no", "fp16", "bf16")
_DEFAULT_PORT = 29500  # Accelerate's

# Accelerate starts several CPU processes as MULTI_GPU with use_cpu, which it does not hand on to them (1.15,
# `prepare_multi_gpu_env`): they stay on the CPU because they see no GPU.
_CPU_NOTE = "# On a machine that has GPUs, hide them: put CUDA_VISIBLE_DEVICES= in front of `accelerate launch`.\n"


@dataclass(frozen=True)
class LaunchFile:
    """
    What `accelerate launch` has to know, under the names of its options.

    Args:
        num_processes (`int`): Processes on all machines together, one a GPU.
        num_machines (`int`, *optional*, defaults to `1`): Machines.
        machine_rank (`int`, *optional*, defaults to `0`): Number of the machine that the file is for.
        main_process_ip (`str`, *optional*): Address of machine 0; needed with several machines.
        main_process_port (`int`, *optional*): Port there; `0` takes a free one, on one machine only.
        mixed_precision (`str`, *optional*, defaults to `"no"`):
            `"no"`, `"fp16"` or `"bf16"`, for a loop of one's own. The Trainer goes by its `bf16` and `fp16` arguments.
        gpu_ids (`str`, *optional*): GPUs of each machine, such as `"0,2"`; by default all.
        cpu (`bool`, *optional*, defaults to `False`): Stay on the CPU, for a dry run.

    Example:

    ```python
    >>> from accelerate_unsloth.launch.config_file import LaunchFile
    >>> LaunchFile(num_processes=3, num_machines=2).problems()[1][:60]
    'num_machines=2 needs main_process_ip, the address of machine'
    ```
    """

    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    mixed_precision: str = "no"
    gpu_ids: str | None = None
    cpu: bool = False

    def problems(self) -> list[str]:
        """Every combination that Accelerate would refuse, misread or silently pass over, with its remedy."""
        if self.num_processes < 1 or self.num_machines < 1:
            return [
                f"num_processes={self.num_processes} and num_machines={self.num_machines} have to be at least 1 each. "
                "Give the processes of all machines together."
            ]
        return [*self._problems_of_machines(), *self._problems_of_devices()]

    def _problems_of_machines(self) -> list[str]:
        found, several = [], self.num_machines > 1
        if self.num_processes % self.num_machines:
            found.append(
                f"num_processes={self.num_processes} counts the processes of all machines, and is not a multiple of "
                f"num_machines={self.num_machines}: each machine starts as many. Give such a multiple."
            )
        if several and not self.main_process_ip:
            found.append(
                f"num_machines={self.num_machines} needs main_process_ip, the address of machine 0 that all others reach."
            )
        if not several and self.main_process_ip:
            found.append(
                f"main_process_ip={self.main_process_ip!r} is for several machines, and num_machines is 1. Give "
                "num_machines, or leave the address out."
            )
        if not 0 <= self.machine_rank < self.num_machines:
            found.append(
                f"machine_rank={self.machine_rank} is not one of the {self.num_machines} machine(s), which count from 0 "
                f"to {self.num_machines - 1}. Give one of these, or more machines."
            )
        port = self.main_process_port
        if port is not None and not (1 if several else 0) <= port < 2**16:
            free = "" if several else ", or 0 for a free one"
            found.append(f"main_process_port={port} is not a port. Give one from 1 to 65535{free}.")
        return found

    def _problems_of_devices(self) -> list[str]:
        found = []
        if self.mixed_precision not in _PRECISIONS:
            found.append(
                f"mixed_precision={self.mixed_precision!r} is not known; choose one of {', '.join(_PRECISIONS)}."
            )
        if self.cpu and self.mixed_precision == "fp16":
            found.append("mixed_precision='fp16' needs a GPU, and cpu stays off them. Use 'bf16' or 'no'.")
        if self.gpu_ids in (None, "all"):
            return found
        if self.cpu:
            found.append(f"gpu_ids={self.gpu_ids!r} names GPUs, and cpu stays off them. Leave one of them out.")
        ids, wanted = self.gpu_ids.split(","), self.num_processes // self.num_machines
        if not re.fullmatch(r"\d+(,\d+)*", self.gpu_ids) or len({int(i) for i in ids}) < len(ids):
            found.append(
                f"gpu_ids={self.gpu_ids!r} are not numbers of different GPUs. Write them as '0,1,3', or 'all'."
            )
        elif len(ids) < wanted:
            found.append(
                f"gpu_ids={self.gpu_ids!r} names {len(ids)} GPU(s), and each machine starts {wanted} process(es), one a "
                "GPU. Name as many, or start fewer."
            )
        return found

    def settings(self) -> dict[str, Any]:
        """What the file holds."""
        port = self.main_process_port
        if port is None and self.num_machines > 1:
            port = _DEFAULT_PORT
        settings = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU" if self.num_processes > 1 else "NO",
            "mixed_precision": self.mixed_precision,
            "num_processes": self.num_processes,
            "num_machines": self.num_machines,
            "machine_rank": self.machine_rank,
            "main_process_ip": self.main_process_ip,
            "main_process_port": port,
            "gpu_ids": None if self.cpu else self.gpu_ids or "all",
            "main_training_function": "main",
            "rdzv_backend": "static",
            "same_network": True,
            "use_cpu": self.cpu,
            "debug": False,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def write(self, path: str | Path, force: bool = False) -> None:
        """
        Write the file, after Accelerate's own loader has read it.

        Args:
            path (`str` or `Path`): Where it goes; missing folders are made. It ends with `.yaml` or `.yml`.
            force (`bool`, *optional*, defaults to `False`): Replace a file that exists.

        Raises:
            ValueError: with every problem, or with what Accelerate's loader says.
            FileExistsError: if the file exists, without `force`.
        """
        path = Path(path)
        check_path(path, force)
        if problems := self.problems():
            raise ValueError("\n".join(problems))
        text = (_CPU_NOTE if self.cpu else "") + yaml.safe_dump(self.settings(), sort_keys=False)
        _check_with_accelerate(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def check_path(path: Path, force: bool) -> None:
    """
    Raises:
        ValueError: if Accelerate would not read a file of that name as YAML.
        FileExistsError: if there is one, without `force`.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} has to end with .yaml or .yml, so that it is read as YAML. Rename it.")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Give another name, or force to replace it.")


def _check_with_accelerate(text: str) -> None:
    from accelerate import __version__
    from accelerate.commands.config.config_args import load_config_from_file

    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial.yaml"
        trial.write_text(text, encoding="utf-8")
        try:
            load_config_from_file(str(trial))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Nothing was written, because accelerate {__version__} does not load it: {error}"
            ) from error
