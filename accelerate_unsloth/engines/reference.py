"""
Unsloth's two calls on transformers and PEFT.

It has none of Unsloth's kernels: it is for dry runs on a CPU, and the oracle that tests compare with.
"""

import copy
from types import MethodType

import torch
from peft import LoraConfig
from peft import get_peft_model as peft_get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..launch.topology import topology
from ..reliability import rank0_writes
from . import check_model_name, environment, placement

_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Options of Unsloth's loaders and LoRA call that change how it runs but not what it computes, or that this engine
# has no counterpart for on a CPU.
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
        **kwargs,
    ):
        """
        Load a causal language model and its tokenizer.

        Args:
            model_name (`str`):
                Hub id or folder.
            max_seq_length (`int`, *optional*, defaults to `2048`):
                Longest sample in tokens; the trainer truncates to it.
            dtype (`torch.dtype`, *optional*):
                Type of the weights: by default float32 on a CPU and bfloat16 on a GPU.
            load_in_4bit (`bool`, *optional*):
                Refused when true: quantized weights need Unsloth and a GPU.
            full_finetuning (`bool`, *optional*, defaults to `False`):
                Train all weights, without `get_peft_model`.

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
        check_model_name(model_name)
        environment.check_loading_arguments(kwargs)
        placement.check_device_map(device_map, topology().world_size, placement.this_device())
        set_seed(random_state)
        source = {"token": token, "revision": revision, "trust_remote_code": trust_remote_code}
        options = {name: value for name, value in kwargs.items() if name not in _UNSLOTH_ONLY}
        dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, **source, **options)
        tokenizer = AutoTokenizer.from_pretrained(model_name, **source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.max_seq_length = max_seq_length
        model.requires_grad_(full_finetuning)
        if full_finetuning:
            _set_checkpointing(model, use_gradient_checkpointing)
        model.save_pretrained_merged = MethodType(_save_pretrained_merged, model)
        rank0_writes.guard(model)
        rank0_writes.guard(tokenizer)
        return model.to(placement.this_device()), tokenizer

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
                Any true value recomputes activations in the backward; Unsloth's offloading has no counterpart here.
                `"auto"` is taken for the default.

        Returns:
            [`~peft.PeftModel`]
        """
        set_seed(random_state)
        config = LoraConfig(
            task_type="CAUSAL_LM",
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
        model.save_pretrained_merged = MethodType(_save_pretrained_merged, model)
        rank0_writes.guard(model)
        return model

    @staticmethod
    def for_training(model, use_gradient_checkpointing=True):
        """Counterpart of Unsloth's call: training mode."""
        return model.train()

    @staticmethod
    def for_inference(model):
        """Counterpart of Unsloth's call: evaluation mode."""
        return model.eval()


FastModel = FastLanguageModel
LOADERS = {"FastLanguageModel": FastLanguageModel, "FastModel": FastModel}


def _set_checkpointing(model, wanted) -> None:
    # The trainer switches checkpointing on by its own argument, so "off" has to reach it through the model.
    model._accelerate_unsloth_checkpointing = bool(wanted)


def _save_pretrained_merged(self, save_directory, tokenizer=None, save_method="merged_16bit", **kwargs):
    """Write the model with its adapters merged into the weights: Unsloth's call, for this engine's models."""
    if save_method not in ("merged_16bit", "lora"):
        raise ValueError(
            f"save_method={save_method!r} needs Unsloth on a GPU; the reference engine knows 'merged_16bit' and 'lora'."
        )
    merge = save_method == "merged_16bit" and hasattr(self, "merge_and_unload")
    model = copy.deepcopy(self).merge_and_unload() if merge else self
    model.save_pretrained(save_directory, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(save_directory)
