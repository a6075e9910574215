"""The usual cases: machines that many people have, with a model that fits them."""

from dataclasses import fields
from typing import Any

from ..plugin import UnslothPlugin
from .explained import ExplainedConfig

# What `get_optimal_config` is asked for; memory as CUDA shows it where that is less than the label says.
GPU_CASES = {
    "one_small_gpu": {"model_size": "3B", "available_memory": "8GB", "num_gpus": 1},
    "two_t4_fp16": {"model_size": "7B", "available_memory": 14.7, "num_gpus": 2},
    "four_24gb": {"model_size": "8B", "available_memory": "24GB", "num_gpus": 4},
    "eight_80gb": {"model_size": "70B", "available_memory": "80GB", "num_gpus": 8},
}

REMARKS = {
    "two_t4_fp16": {
        "precision": "a T4 has no bfloat16: the script loads with dtype=torch.float16 and trains with fp16=True, "
        "bf16=False"
    }
}


def plain_plugin(**options: Any) -> UnslothPlugin:
    """A plugin of defaults, whatever the environment says, and `options`."""
    return UnslothPlugin(**{option.name: option.metadata["default"] for option in fields(UnslothPlugin)} | options)


def cpu_dry_run() -> ExplainedConfig:
    """Two CPU processes, to see a script run before it costs GPU time."""
    return ExplainedConfig(
        {"num_gpus": 2, "plugin": plain_plugin(engine="reference")},
        {
            "processes": "2 on the CPU, as `accelerate-unsloth config path unsloth_ddp_cpu` launches them",
            "engine": "transformers and PEFT, because Unsloth's kernels need a GPU",
            "model": "any that fits the machine's memory once for each process, in 32 bits; none is assumed",
        },
    )
