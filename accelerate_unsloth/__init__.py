"""
Exact and fast multi-GPU fine-tuning with Unsloth, as a Hugging Face Accelerate plugin.

Importing this package costs nothing: every public name is resolved when it is first used, so that Unsloth can be
imported before trl, transformers and peft, and each process can take its own GPU before CUDA starts. Only under a
launcher of several processes PyTorch is imported, to see whether they run without GPUs.
"""

from importlib import import_module

from .launch.topology import declare_cpu_launch

__version__ = "0.1.0"

_PUBLIC = {
    "FastLanguageModel": "engines.loaded",
    "FastModel": "engines.loaded",
    "SFTConfig": "trainers.sft",
    "SFTTrainer": "trainers.sft",
    "DistributedTrainerMixin": "trainers.mixin",
    "MultiGPUTrainer": "custom_loop.trainer",
    "AggregationMethod": "policies.aggregation",
    "UnslothPlugin": "plugin",
    "enable_multi_gpu": "patch",
    "disable_multi_gpu": "patch",
    "is_multi_gpu_enabled": "patch",
    "get_multi_gpu_status": "patch",
    "get_active_config": "patch",
    "DeviceManager": "devices.manager",
    "ConfigManager": "config_manager",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})


declare_cpu_launch()
