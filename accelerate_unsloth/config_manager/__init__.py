"""Options for `enable_multi_gpu`: computed from model and memory, checked, and stored in files."""

import difflib
import inspect
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..devices.manager import Device, DeviceManager
from ..launch.topology import Topology
from ..memory import model_sizes
from ..memory.budget import GIB
from ..patch import enable_multi_gpu, find_problems
from ..plugin import UnslothPlugin, is_count
from .workload import Workload

_BYTES = {"GB": 10**9, "GIB": GIB, "MB": 10**6, "MIB": 2**20}

# Memory as CUDA reports it where that is less than the label says.
_GPU_TEMPLATES = {
    "one_small_gpu": {"model_size": "3B", "available_memory": "8GB", "num_gpus": 1},
    "two_t4_fp16": {"model_size": "7B", "available_memory": 14.7, "num_gpus": 2},
    "four_24gb": {"model_size": "8B", "available_memory": "24GB", "num_gpus": 4},
    "eight_80gb": {"model_size": "70B", "available_memory": "80GB", "num_gpus": 8},
}
_T4_PRECISION = "a T4 has no bfloat16: load the model with dtype=torch.float16, and train with fp16=True, bf16=False"
_CPU_ASSUMPTIONS = {
    "processes": "2 on the CPU, as `accelerate-unsloth config path unsloth_ddp_cpu` launches them",
    "engine": "transformers and PEFT, because Unsloth's kernels need a GPU",
    "model": "any that fits the machine's memory once per process, in 32 bits; none is assumed",
}


class ExplainedConfig(dict):
    """
    Options as `enable_multi_gpu(**config)` takes them, and what they were computed from.

    Args:
        options (`Mapping[str, Any]`): The options.
        assumptions (`Mapping[str, str]`): By subject, what was assumed and decided.
    """

    def __init__(self, options: Mapping[str, Any], assumptions: Mapping[str, str]):
        super().__init__(options)
        self.assumptions = dict(assumptions)

    def explain(self) -> str:
        """Return one line per assumption."""
        return "\n".join(f"{subject}: {said}" for subject, said in self.assumptions.items())


class ConfigManager:
    """
    Compute, check and store configurations as `enable_multi_gpu(**config)` takes them.

    Args:
        devices ([`DeviceManager`], *optional*):
            Where GPUs are read from if their memory or number is not given; by default those of this process.
    """

    def __init__(self, devices: DeviceManager | None = None):
        self._devices = devices

    def get_optimal_config(
        self,
        model_size: Any = "7B",
        available_memory: str | float | None = None,
        num_gpus: int | None = None,
        max_seq_length: int = 2048,
        load_in_4bit: bool = True,
        r: int = 16,
        optim: str = "adamw_8bit",
    ) -> ExplainedConfig:
        """
        Compute the options of a LoRA fine-tune, by the arithmetic of `accelerate-unsloth estimate-memory`.

        It decides the number of processes, the largest micro-batch, and whether activations are recomputed. None of them
        changes the samples of a step or its loss. `ACCELERATE_UNSLOTH_*` variables take precedence. What the script must do
        for the arithmetic to hold is in `assumptions`.

        Args:
            model_size (`str`, `Path`, [`~transformers.PreTrainedConfig`] or [`ModelShape`], *optional*, defaults to `"7B"`):
                A size of the table in `memory.model_sizes.KNOWN`, a hub id, a folder, or a config.
                A name whose model is not of the Llama, Mistral or Qwen kind loads the engine.
            available_memory (`str` or `float`, *optional*):
                Memory of each GPU: `"32GB"` (of 10**9 bytes), `"24GiB"`, or a number of GiB. By default the total of
                the smallest of this process's GPUs.
            num_gpus (`int`, *optional*):
                Number of processes, one per GPU. By default those of this launch, without a launcher the visible GPUs.
            max_seq_length (`int`, *optional*, defaults to `2048`):
                Tokens of the longest sample.
            load_in_4bit (`bool`, *optional*, defaults to `True`):
                Whether the script loads 4-bit weights instead of 16 bits.
            r (`int`, *optional*, defaults to `16`):
                Rank of the adapters, on all linear layers.
            optim (`str`, *optional*, defaults to `"adamw_8bit"`):
                The Trainer's optimizer.

        Returns:
            [`ExplainedConfig`]: a `dict` with `assumptions`, and `explain()` to print them.

        Raises:
            ValueError: if nothing fits, with the arithmetic and the fix; for an unknown size or amount; or without GPUs if
                `available_memory` is not given.

        Example:

        ```python
        >>> from accelerate_unsloth import ConfigManager, enable_multi_gpu
        >>> config = ConfigManager().get_optimal_config("1B", "8GB", num_gpus=1)
        >>> with enable_multi_gpu(**config):
        ...     print(config.assumptions["memory"])
        8GB, which is 7.5 GiB, of each GPU; 0.9 of it may be used
        ```
        """
        for name, value in {"num_gpus": num_gpus, "max_seq_length": max_seq_length, "r": r}.items():
            is_open = value is None and name == "num_gpus"
            if not is_open and not is_count(value):
                raise ValueError(f"{name}={value!r} is not a whole number of at least 1. Give one.")
        script = {"max_seq_length": max_seq_length, "load_in_4bit": load_in_4bit, "r": r, "optim": optim}
        return self._compute(UnslothPlugin(), model_size, available_memory, num_gpus, **script)

    def validate(self, config: Any) -> list[str]:
        """
        List everything that is wrong with a configuration, on any machine.

        Args:
            config (`Mapping[str, Any]`): What would be passed as `enable_multi_gpu(**config)`.

        Returns:
            `list[str]`: each problem with its fix; empty if `enable_multi_gpu` accepts it.
        """
        if not isinstance(config, Mapping):
            return [f"The options are a {type(config).__name__}; give a mapping of the options of enable_multi_gpu()."]
        problems = _unknown_names(config, inspect.signature(enable_multi_gpu).parameters, "enable_multi_gpu()")
        problems += find_problems(config)
        plugin = config.get("plugin")
        return problems + (_plugin_problems(asdict(plugin)) if isinstance(plugin, UnslothPlugin) else [])

    def save(self, config: Mapping[str, Any], path: str | Path) -> None:
        """
        Write a configuration as YAML, with its assumptions as comments. An existing file is replaced.

        Args:
            config (`Mapping[str, Any]`): The options.
            path (`str` or `Path`): The file.

        Raises:
            ValueError: with every problem that [`~ConfigManager.validate`] finds.
        """
        _raise_problems(self.validate(config), "cannot be saved")
        values = dict(config)
        if values.get("plugin") is not None:  # every option, so that the file does not depend on the environment
            values["plugin"] = asdict(values["plugin"])
        explained = config.explain().splitlines() if isinstance(config, ExplainedConfig) else []
        comments = "".join(f"# {line}\n" for line in ["Options of accelerate_unsloth.enable_multi_gpu()", *explained])
        Path(path).write_text(comments + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def load(self, path: str | Path) -> dict[str, Any]:
        """
        Read a configuration that [`~ConfigManager.save`] or a person wrote.

        Args:
            path (`str` or `Path`):
                A YAML file of plain values: options of `enable_multi_gpu`, and under `plugin` those of
                [`UnslothPlugin`].

        Returns:
            `dict[str, Any]`: for `enable_multi_gpu(**config)`.

        Raises:
            ValueError: with every problem, including unknown names.
        """
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not plain YAML: {error}. Write plain names and values.") from error
        problems = []
        if isinstance(config, dict) and isinstance(config.get("plugin"), dict):
            problems = _plugin_problems(config["plugin"])
            config["plugin"] = None if problems else UnslothPlugin(**config["plugin"])
        _raise_problems([*self.validate(config), *problems], f"in {path} cannot be used")
        return config

    def templates(self) -> dict[str, ExplainedConfig]:
        """
        Return configurations of common cases: one small GPU, two T4s, four 24 GB GPUs, eight 80 GB GPUs, a CPU dry run.

        Returns:
            `dict[str, ExplainedConfig]`: by name, independent of any `ACCELERATE_UNSLOTH_*` variables.
        """
        plugin = UnslothPlugin(**{option.name: option.metadata["default"] for option in fields(UnslothPlugin)})
        found = {name: self._compute(plugin, **case) for name, case in _GPU_TEMPLATES.items()}
        found["two_t4_fp16"].assumptions["precision"] = _T4_PRECISION
        on_cpu = {"num_gpus": 2, "plugin": replace(plugin, engine="reference")}
        return {**found, "cpu_dry_run": ExplainedConfig(on_cpu, _CPU_ASSUMPTIONS)}

    def _compute(
        self,
        plugin: UnslothPlugin,
        model_size: Any,
        available_memory: str | float | None,
        num_gpus: int | None,
        **script,
    ) -> ExplainedConfig:
        model = model_sizes.resolve(model_size, before_transformers=_load_engine)
        processes, of_machine, counted = self._processes(num_gpus)
        gpu_gib, read = self._memory(available_memory, processes)
        # Where the number of processes is open, with the buffer that several need.
        resources = (gpu_gib, plugin.memory_fraction, processes or 2, of_machine or 2)
        work = Workload(model.shape, model.source, *resources, **script, frozen_weights=plugin.frozen_weights)
        chosen = work.plan(plugin)
        options: dict[str, Any] = {} if processes is None else {"num_gpus": processes}
        if chosen.checkpointing.mode != "unchanged":
            options["enable_gradient_checkpointing"] = chosen.recomputed > 0
        options["plugin"] = replace(plugin, micro_batch_tokens=chosen.micro_batch.token_budget)
        memory = f"{read}; {plugin.memory_fraction:g} of it may be used"
        return ExplainedConfig(options, {**work.explain(chosen), "processes": counted, "memory": memory})

    def _visible(self) -> list[Device]:
        if self._devices is None:
            self._devices = DeviceManager()
        return self._devices.get_available_devices()

    def _processes(self, num_gpus: int | None) -> tuple[int | None, int | None, str]:
        """Return how many processes train, how many of them on this machine, and why."""
        if num_gpus is not None:
            return num_gpus, num_gpus, f"{num_gpus}, as asked for"
        if "RANK" in os.environ:
            place = Topology.from_environment()
            return place.world_size, place.local_world_size, f"{place.world_size}, those of this launch"
        if visible := len(self._visible()):
            return visible, visible, f"{visible}, one for each visible GPU"
        return None, None, "any number: none was given, and no GPU is visible here"

    def _memory(self, available: str | float | None, num_gpus: int | None) -> tuple[float, str]:
        if available is not None:
            gpu_gib = _parse_gib(available)
            return gpu_gib, f"{available}, which is {gpu_gib:.1f} GiB, of each GPU"
        # A launch takes the first GPUs, not the freest. The total is the same on every rank.
        gpus = self._visible()[:num_gpus]
        if not gpus:
            notes = " ".join(self._devices.notes)
            raise ValueError(
                f"available_memory was not given, and no GPU is visible whose memory could be read. {notes} Give it, "
                "such as available_memory='24GB', or use templates()['cpu_dry_run'] for a dry run on the CPU."
            )
        smallest = min(gpus, key=lambda gpu: gpu.total_gib)
        source = f"the total of cuda:{smallest.index} ({smallest.name})"
        return smallest.total_gib, f"{smallest.total_gib:.1f} GiB, {source}"


def _load_engine() -> None:
    """Import Unsloth, where it is the engine, because it must be imported before transformers."""
    from ..engines import select  # noqa: F401


def _parse_gib(amount: str | float) -> float:
    """Return an amount of memory in GiB: a number of GiB, or a text with its unit."""
    gib = 0.0
    if isinstance(amount, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]i?B)\s*", amount, re.IGNORECASE)
    ):
        gib = float(match[1]) * _BYTES[match[2].upper()] / GIB
    elif isinstance(amount, (int, float)) and not isinstance(amount, bool):
        gib = float(amount)
    if not 0 < gib < math.inf:
        raise ValueError(
            f"available_memory={amount!r} is not an amount of memory above 0. Give a text with its unit, such as "
            "'24GB' or '22.5GiB', or a number of GiB."
        )
    return gib


def _plugin_problems(options: Mapping[str, Any]) -> list[str]:
    known = [field.name for field in fields(UnslothPlugin)]
    problems = _unknown_names(options, known, "UnslothPlugin")
    for name in options:  # one by one, because UnslothPlugin stops at the first problem
        problems += _rejection(name, options[name]) if name in known else []
    if options.get("micro_batch") == "fixed" and options.get("micro_batch_tokens") is not None:
        problems.append(
            f"micro_batch_tokens={options['micro_batch_tokens']} has no effect with micro_batch='fixed', which keeps the "
            "micro-batches of the training arguments. Leave one of them out."
        )
    return list(dict.fromkeys(problems))  # a wrong environment variable is a problem of every option


def _rejection(name: str, value: Any) -> list[str]:
    try:
        UnslothPlugin(**{name: value})
    except ValueError as error:
        return [str(error)]
    return []


def _unknown_names(options: Mapping[str, Any], known: Collection[str], owner: str) -> list[str]:
    problems = []
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Leave it out; known are {', '.join(known)}."
            problems.append(f"{name!r} is not an option of {owner}. {advice}")
    return problems


def _raise_problems(problems: list[str], what: str) -> None:
    if problems:
        raise ValueError(f"These options {what}:\n  " + "\n  ".join(problems))
