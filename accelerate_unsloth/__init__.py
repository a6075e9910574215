"""
Exact and fast multi-GPU fine-tuning with Unsloth, as a Hugging Face Accelerate plugin.

Importing this package costs nothing: every public name is resolved when it is first used, so that Unsloth can be
imported before trl, transformers and peft, and each process can take its own GPU before CUDA starts. Only under a
launcher of several processes PyTorch is imported, to see whether they run without GPUs.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .launch.topology import declare_cpu_launch

__version__ = "0.2.0"

_PUBLIC = {
    "FastLanguageModel": "engines.select",
    "FastModel": "engines.select",
    "SFTConfig": "trainers.sft",
    "SFTTrainer": "trainers.sft",
    "CPOConfig": "trainers.orpo_cpo",
    "CPOTrainer": "trainers.orpo_cpo",
    "DPOConfig": "trainers.preference",
    "DPOTrainer": "trainers.preference",
    "KTOConfig": "trainers.kto",
    "KTOTrainer": "trainers.kto",
    "ORPOConfig": "trainers.orpo_cpo",
    "ORPOTrainer": "trainers.orpo_cpo",
    "UnslothTrainer": "trainers.unsloth_trainer",
    "UnslothTrainingArguments": "trainers.unsloth_trainer",
    "RewardConfig": "trainers.preference",
    "RewardTrainer": "trainers.preference",
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

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow the map
    from .config_manager import ConfigManager as ConfigManager
    from .custom_loop.trainer import MultiGPUTrainer as MultiGPUTrainer
    from .devices.manager import DeviceManager as DeviceManager
    from .engines.select import FastLanguageModel as FastLanguageModel
    from .engines.select import FastModel as FastModel
    from .patch import disable_multi_gpu as disable_multi_gpu
    from .patch import enable_multi_gpu as enable_multi_gpu
    from .patch import get_active_config as get_active_config
    from .patch import get_multi_gpu_status as get_multi_gpu_status
    from .patch import is_multi_gpu_enabled as is_multi_gpu_enabled
    from .plugin import UnslothPlugin as UnslothPlugin
    from .policies.aggregation import AggregationMethod as AggregationMethod
    from .trainers.kto import KTOConfig as KTOConfig
    from .trainers.kto import KTOTrainer as KTOTrainer
    from .trainers.mixin import DistributedTrainerMixin as DistributedTrainerMixin
    from .trainers.orpo_cpo import CPOConfig as CPOConfig
    from .trainers.orpo_cpo import CPOTrainer as CPOTrainer
    from .trainers.orpo_cpo import ORPOConfig as ORPOConfig
    from .trainers.orpo_cpo import ORPOTrainer as ORPOTrainer
    from .trainers.preference import DPOConfig as DPOConfig
    from .trainers.preference import DPOTrainer as DPOTrainer
    from .trainers.preference import RewardConfig as RewardConfig
    from .trainers.preference import RewardTrainer as RewardTrainer
    from .trainers.sft import SFTConfig as SFTConfig
    from .trainers.sft import SFTTrainer as SFTTrainer
    from .trainers.unsloth_trainer import UnslothTrainer as UnslothTrainer
    from .trainers.unsloth_trainer import UnslothTrainingArguments as UnslothTrainingArguments


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})


declare_cpu_launch()
