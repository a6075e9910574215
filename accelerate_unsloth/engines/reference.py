"""
Unsloth's loading calls on transformers and PEFT, and a replacement of the module `unsloth`.

They run without a GPU, but have none of Unsloth's kernels. They are for dry runs on a CPU and for tests of exactness.
"""

import copy
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import MethodType, ModuleType

import torch
from peft import LoraConfig
from peft import get_peft_model as peft_get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..plugin import UnslothPlugin
from ..reliability import rank0_writes
from ..weights import all_present
from ..weights.loading import placing
from . import checks

_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Options of Unsloth's loading calls that are ignored: they do not change what is computed, or have no counterpart
# here.
_UNSLOTH_ONLY = {
    "device_map_planner_kwargs", "disable_log_stats", "fast_inference", "fix_tokenizer", "float32_mixed_precision",
    "float8_kv_cache", "gpu_memory_utilization", "load_in_16bit", "loftq_config", "max_lora_rank", "max_seq_length",
    "offload_embedding", "temporary_location", "unsloth_tiled_mlp", "use_exact_model_name",
}  # fmt: skip


class FastLanguageModel:
    """
    `unsloth.FastLanguageModel` with the same keyword names, on transformers and PEFT.

    Example:

    ```python
    >>> from accelerate_unsloth import FastLanguageModel
    >>> model, tokenizer = FastLanguageModel.from_pretrained("path/to/model", max_seq_length=2048)
    >>> model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    ```
    """

    @staticmethod
    def from_pretrained(
        model_name,
        max_seq_length=2048,
        dtype=None,
        load_in_4bit=None,
        load_in_8bit=False,
        full_finetuning=False,
        token=None,
        device_map=None,
        trust_remote_code=False,
        use_gradient_checkpointing="unsloth",
        revision=None,
        random_state=3407,
        auto_model=None,
        **kwargs,
    ):
        """
        Load a model, by default a causal language model, and its tokenizer.

        Args:
            model_name (`str`):
                Hub id or folder.
            max_seq_length (`int`, *optional*, defaults to `2048`):
                Longest sample in tokens; the trainer truncates to it.
            dtype (`torch.dtype`, *optional*):
                Type of the weights: by default float32 on a CPU and bfloat16 on a GPU.
            load_in_4bit (`bool`, *optional*):
                Must not be true: quantized weights need Unsloth and a GPU.
            full_finetuning (`bool`, *optional*, defaults to `False`):
                Train all weights, without `get_peft_model`.
            auto_model (`type`, *optional*, defaults to `AutoModelForCausalLM`):
                Class that loads the model. A reward model takes `AutoModelForSequenceClassification` and `num_labels=1`.

        Returns:
            `tuple[PreTrainedModel, PreTrainedTokenizerBase]`

        Raises:
            ValueError: for quantized loading, or a `device_map` that splits the model over several processes.
            FileNotFoundError: for a path that does not exist.
        """
        if load_in_4bit or load_in_8bit:
            bits = "load_in_4bit" if load_in_4bit else "load_in_8bit"
            raise ValueError(
                f"{bits}=True needs Unsloth on a GPU, and this process uses the reference engine "
                f"(transformers and PEFT). Set {bits}=False here, or run on a machine with a GPU."
            )
        checks.check_loading(model_name, {**kwargs, "device_map": device_map})
        set_seed(random_state)
        source = {"token": token, "revision": revision, "trust_remote_code": trust_remote_code}
        options = {name: value for name, value in kwargs.items() if name not in _UNSLOTH_ONLY}
        dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        device, loader = checks.this_device(), auto_model or AutoModelForCausalLM
        with placing(UnslothPlugin().frozen_weights, device, trains_all=full_finetuning):
            model = loader.from_pretrained(model_name, dtype=dtype, **source, **options)
        tokenizer = AutoTokenizer.from_pretrained(model_name, **source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.max_seq_length = max_seq_length
        model.requires_grad_(full_finetuning)
        if full_finetuning:
            _set_checkpointing(model, use_gradient_checkpointing)
        _add_saving(model)
        rank0_writes.guard(tokenizer)
        checks.note_stock_trainers()
        return model.to(device), tokenizer

    @staticmethod
    def get_peft_model(
        model,
        r=16,
        target_modules=_LINEAR_LAYERS,
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        layers_to_transform=None,
        layers_pattern=None,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        modules_to_save=None,
        init_lora_weights=True,
        task_type=None,
        **kwargs,
    ):
        """
        Add LoRA adapters, with the same initial weights on every rank.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                As `from_pretrained` returned it.
            r (`int`, *optional*, defaults to `16`):
                Rank of the adapters.
            use_gradient_checkpointing (`bool` or `str`, *optional*, defaults to `"unsloth"`):
                Any true value, `"auto"` included, recomputes activations in the backward, without Unsloth's
                offloading.
            task_type (`str`, *optional*):
                As for PEFT; by default that of the model. A new head of a classifier is trained along.

        Returns:
            [`~peft.PeftModel`]
        """
        set_seed(random_state)
        config = LoraConfig(
            task_type=task_type or ("SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM"),
            r=r,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            **{name: value for name, value in kwargs.items() if name not in _UNSLOTH_ONLY},
        )
        max_seq_length = model.max_seq_length
        model = peft_get_peft_model(model, config)
        model.max_seq_length = max_seq_length
        _set_checkpointing(model, use_gradient_checkpointing)
        _add_saving(model)
        return model

    @staticmethod
    def for_training(model, use_gradient_checkpointing=True):
        """Switch to training mode, like Unsloth's call."""
        return model.train()

    @staticmethod
    def for_inference(model):
        """Switch to evaluation mode, like Unsloth's call."""
        return model.eval()


FastModel = FastLanguageModel
LOADERS = {"FastLanguageModel": FastLanguageModel, "FastModel": FastModel}


def _set_checkpointing(model, wanted) -> None:
    # `trainers/sft.py` sets the argument of the Trainer from this attribute.
    model._accelerate_unsloth_checkpointing = bool(wanted)


def _add_saving(model) -> None:
    model.save_pretrained_merged = MethodType(_save_pretrained_merged, model)
    rank0_writes.guard(model)


def _save_pretrained_merged(self, save_directory, tokenizer=None, save_method="merged_16bit", **kwargs):
    """Save the model with its adapters merged into the weights, like Unsloth's call."""
    if save_method not in ("merged_16bit", "lora"):
        raise ValueError(
            f"save_method={save_method!r} needs Unsloth on a GPU. Use 'merged_16bit' or 'lora' with the reference engine."
        )
    merge = save_method == "merged_16bit" and hasattr(self, "merge_and_unload")
    with all_present(self):  # on the CPU, where they are not on this device all the time
        model = copy.deepcopy(self).cpu().merge_and_unload() if merge else self
    model.save_pretrained(save_directory, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(save_directory)


def is_bfloat16_supported() -> bool:
    """Return `True`: PyTorch computes in bfloat16 on every CPU, while float16 training needs a GPU."""
    return True


_UNSLOTH_NAMES = {
    **LOADERS,
    "is_bfloat16_supported": is_bfloat16_supported,
    "is_bf16_supported": is_bfloat16_supported,
}


class _NoSubmodules(list):
    """A package's search path that raises `ImportError` when a submodule is looked for."""

    def __iter__(self):
        raise ImportError(
            "This process uses the reference engine (transformers and PEFT), in which `unsloth` has only "
            f"{', '.join(_UNSLOTH_NAMES)}. Leave the other names out, or run on a machine with a GPU, where `unsloth` is "
            "Unsloth."
        )


def make_unsloth_module() -> ModuleType:
    """Return a module for `sys.modules["unsloth"]`, with the names of Unsloth that this engine supports."""
    module = ModuleType("unsloth")
    module.__spec__ = ModuleSpec("unsloth", None, origin=__file__, is_package=True)
    module.__path__ = _NoSubmodules()
    module.__version__ = version("unsloth")
    vars(module).update(_UNSLOTH_NAMES)
    return module
