"""Options for `enable_multi_gpu`: worked out from model and memory, checked, kept in files."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..devices.manager import Device, DeviceManager
from ..launch.topology import Topology
from ..memory import model_sizes
from ..memory.estimate import EXPERTS_NOTE
from ..plugin import UnslothPlugin
from ..policies import micro_batch
from ..policies.micro_batch import MicroBatchChoice
from . import amounts, checks, files, templates
from .explained import ExplainedConfig
from .fitting import ROWS_OF_A_STEP, Fit, Workload, fit

__all__ = ["ConfigManager", "ExplainedConfig"]


class ConfigManager:
    """
    Configurations as `enable_multi_gpu(**config)` takes them.

    Args:
        devices ([`DeviceManager`], *optional*):
            Where GPUs are read from, if memory or their number is not given; by default those of this process.

    Example:

    ```python
    >>> from accelerate_unsloth import ConfigManager
    >>> config = ConfigManager().get_optimal_config("7B", available_memory="32GB", num_gpus=4)
    >>> config["num_gpus"], config["enable_gradient_checkpointing"]
    (4, False)
    >>> config.assumptions["model"]
    '7B, with the dims of Qwen2.5-7B'
    ```
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
        Work out the options of a LoRA fine-tune, by the arithmetic of `accelerate-unsloth estimate-memory`.

        Decided are the number of processes, the largest micro-batch, and whether activations are recomputed, which wins
        over the script. None of them changes the samples of a step or its loss, and the batch stays the script's. What the
        script has to do for the arithmetic to hold is in `assumptions`. What `ACCELERATE_UNSLOTH_*` variables say is obeyed.

        Args:
            model_size (`str`, `Path`, [`~transformers.PreTrainedConfig`] or [`ModelShape`], *optional*, defaults to `"7B"`):
                A size of the table in `shapes.KNOWN`, a hub id, a folder, or a config.
            available_memory (`str` or `float`, *optional*):
                Memory of each GPU: `"32GB"` (of 10**9 bytes), `"24GiB"`, or a number of GiB. By default the total of
                the smallest of this process's GPUs, which reads the same on every rank; what others hold of it is seen
                to when training is planned.
            num_gpus (`int`, *optional*):
                Processes, one a GPU. By default those of this launch, without a launcher the visible GPUs; where there
                are none it stays open.
            max_seq_length (`int`, *optional*, defaults to `2048`):
                Tokens of the longest row.
            load_in_4bit (`bool`, *optional*, defaults to `True`):
                Whether the script loads 4-bit weights instead of 16 bits.
            r (`int`, *optional*, defaults to `16`):
                Rank of the adapters, on all linear layers.
            optim (`str`, *optional*, defaults to `"adamw_8bit"`):
                The Trainer's optimizer.

        Returns:
            [`ExplainedConfig`]: a `dict` with `assumptions`, and `explain()` to print them.

        Raises:
            ValueError: if nothing fits, with the arithmetic and the remedy; for an unknown size or amount; or without
                GPUs if `available_memory` is not given.

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
            _check_whole_number(name, value, may_be_none=name == "num_gpus")
        return self._work_out(
            UnslothPlugin(), model_size, available_memory, num_gpus, max_seq_length, load_in_4bit, r, optim
        )

    def _work_out(
        self,
        plugin: UnslothPlugin,
        model_size: Any,
        available_memory: str | float | None,
        num_gpus: int | None,
        max_seq_length: int = 2048,
        load_in_4bit: bool = True,
        r: int = 16,
        optim: str = "adamw_8bit",
    ) -> ExplainedConfig:
        """As `get_optimal_config`, with options that are given."""
        named = model_sizes.resolve(model_size)
        processes, counted = self._processes(num_gpus)
        gpu_gib, read = self._memory(available_memory, processes)
        work = Workload(
            shape=named.shape,
            name=named.source,
            load_in_4bit=load_in_4bit,
            r=r,
            optim=optim,
            max_seq_length=max_seq_length,
            num_gpus=processes or 2,  # where it is open, with the buffer that several need
            gpu_gib=gpu_gib,
            fraction=plugin.memory_fraction,
        )
        plans_cut = micro_batch.why_fixed(plugin.micro_batch, True) is None
        found = fit(work, plugin.gradient_checkpointing, plans_cut)
        cut = micro_batch.resolve(
            plugin.micro_batch, plugin.micro_batch_tokens, micro_batch.Facts(max_seq_length, found.tokens)
        )
        options: dict[str, Any] = {} if processes is None else {"num_gpus": processes}
        if found.checkpointing.mode != "unchanged":
            options["enable_gradient_checkpointing"] = found.checkpointing.mode == "unsloth"
        options["plugin"] = replace(plugin, micro_batch_tokens=cut.token_budget)
        memory = f"{read}; {plugin.memory_fraction:g} of it may be used"
        return ExplainedConfig(options, {**_assumptions(work, found, cut), "processes": counted, "memory": memory})

    def validate(self, config: Any) -> list[str]:
        """
        Look for everything that is wrong with a configuration, on any machine.

        Args:
            config (`Mapping[str, Any]`):
                What would be passed as `enable_multi_gpu(**config)`.

        Returns:
            `list[str]`: each problem with its remedy; empty if `enable_multi_gpu` takes it.

        Example:

        ```python
        >>> from accelerate_unsloth import ConfigManager
        >>> len(ConfigManager().validate({"num_gpu": 4, "batch_size_per_gpu": 0}))
        2
        ```
        """
        return checks.of_config(config)

    def save(self, config: Mapping[str, Any], path: str | Path) -> None:
        """
        Write a configuration as YAML, with its assumptions as comments. An existing file is replaced.

        Args:
            config (`Mapping[str, Any]`):
                The options.
            path (`str` or `Path`):
                The file.

        Raises:
            ValueError: with every problem that [`~ConfigManager.validate`] finds.
        """
        files.write(config, path)

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
            ValueError: with every problem, unknown names among them.

        Example:

        ```python
        >>> import os, tempfile
        >>> from accelerate_unsloth import ConfigManager
        >>> manager, path = ConfigManager(), os.path.join(tempfile.mkdtemp(), "config.yaml")
        >>> manager.save({"num_gpus": 4}, path)
        >>> manager.load(path)
        {'num_gpus': 4}
        ```
        """
        return files.read(path)

    def templates(self) -> dict[str, ExplainedConfig]:
        """
        Configurations of the usual cases: one small GPU, two T4s, four GPUs of 24 GB, eight of 80 GB, a CPU dry run.

        Returns:
            `dict[str, ExplainedConfig]`: by name; each one a copy of its own, whose `assumptions` say what it is for, and
            whose options are the same under any `ACCELERATE_UNSLOTH_*` variables.

        Example:

        ```python
        >>> from accelerate_unsloth import ConfigManager
        >>> list(ConfigManager().templates())
        ['one_small_gpu', 'two_t4_fp16', 'four_24gb', 'eight_80gb', 'cpu_dry_run']
        ```
        """
        plugin = templates.plain_plugin()
        found = {name: self._work_out(plugin, **case) for name, case in templates.GPU_CASES.items()}
        for name, remarks in templates.REMARKS.items():
            found[name].assumptions.update(remarks)
        return {**found, "cpu_dry_run": templates.cpu_dry_run()}

    # ---- What is read here if it is not given ----

    def _visible(self) -> list[Device]:
        if self._devices is None:
            self._devices = DeviceManager()
        return self._devices.get_available_devices()

    def _processes(self, num_gpus: int | None) -> tuple[int | None, str]:
        if num_gpus is not None:
            return num_gpus, f"{num_gpus}, as asked for"
        if "RANK" in os.environ:
            launched = Topology.from_environment().world_size
            return launched, f"{launched}, those of this launch"
        if visible := len(self._visible()):
            return visible, f"{visible}, one for each visible GPU"
        return None, "any number: none was given, and no GPU is visible here"

    def _memory(self, available: str | float | None, num_gpus: int | None) -> tuple[float, str]:
        if available is not None:
            gpu_gib = amounts.gib(available)
            return gpu_gib, f"{available}, which is {gpu_gib:.1f} GiB, of each GPU"
        # A launch takes the first GPUs, not the freest.
        gpus = self._visible()[:num_gpus]
        if not gpus:
            notes = " ".join(self._devices.notes)
            raise ValueError(
                f"available_memory was not given, and no GPU is visible whose memory could be read. {notes} Give it, "
                "such as available_memory='24GB', or take templates()['cpu_dry_run'] for a dry run on the CPU."
            )
        smallest = min(gpus, key=lambda gpu: gpu.total_gib)
        return (
            smallest.total_gib,
            f"{smallest.total_gib:.1f} GiB, the total of cuda:{smallest.index} ({smallest.name})",
        )


def _check_whole_number(name: str, value: Any, may_be_none: bool) -> None:
    if may_be_none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1. Give one.")


def _assumptions(work: Workload, found: Fit, cut: MicroBatchChoice) -> dict[str, str]:
    mode = found.checkpointing.mode
    chosen = {
        "unsloth": "recomputed",
        "none": "kept",
        "unchanged": "as the script says, recomputed if it says nothing",
    }[mode]
    if cut.token_budget is None:
        cutting = f"as the script cuts them: {cut.reason}; up to {found.tokens:,} tokens fit"
    else:
        cutting = f"at most {cut.token_budget:,} tokens, {cut.token_budget // work.max_seq_length} full rows"
    return {
        "model": work.name,
        "script": f"load_in_4bit={work.load_in_4bit}, max_seq_length={work.max_seq_length}, r={work.r} on all linear "
        f"layers, optim={work.optim!r}",
        "activations": f"{chosen}, for steps of {ROWS_OF_A_STEP} full rows a process: {found.checkpointing.reason}",
        "micro-batches": f"{cutting}; the samples of a step stay the script's",
        **({"experts": EXPERTS_NOTE} if work.shape.has_experts else {}),
    }
