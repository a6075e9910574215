"""Unsloth's loaders, one per rank: imported first, quiet on all ranks but one, and held to this rank's GPU."""

import functools

import torch

from .. import saving
from ..distributed import topology
from ..quiet import muted_prints
from . import check_model_name, placement


def _import_unsloth():
    try:
        with muted_prints():
            import unsloth
    except Exception as error:
        raise ImportError(
            f"Unsloth could not be imported on a machine with GPUs ({type(error).__name__}: {error}). Run "
            "`python -c 'import unsloth'` to see why, mend it, or choose ACCELERATE_UNSLOTH_ENGINE=reference for "
            "transformers and PEFT without Unsloth's kernels."
        ) from error
    return unsloth


def _own_device() -> str:
    return f"cuda:{torch.cuda.current_device()}"


def _for_several_processes(base):
    """
    A loader of Unsloth whose models sit on this rank's GPU and are saved by one process.

    Unsloth places a model on `LOCAL_RANK` by itself (unsloth 2026.10.6, `loader_utils.prepare_device_map`), so its
    default placement is left alone, and only checked.
    """

    class Loader(base):
        @staticmethod
        @functools.wraps(base.from_pretrained)
        def from_pretrained(*args, **kwargs):
            for name in (*args[:1], *(value for key, value in kwargs.items() if key == "model_name")):
                check_model_name(name)
            placement.check_device_map(kwargs.get("device_map"), topology().world_size, _own_device())
            with muted_prints():
                model, tokenizer = base.from_pretrained(*args, **kwargs)
            if topology().world_size > 1:
                placement.check_placement((p.device for p in model.parameters()), _own_device())
            saving.guard(model)
            saving.guard(tokenizer)
            return model, tokenizer

        @staticmethod
        @functools.wraps(base.get_peft_model)
        def get_peft_model(model, *args, **kwargs):
            with muted_prints():
                model = base.get_peft_model(model, *args, **kwargs)
            saving.guard(model)
            return model

    Loader.__name__ = Loader.__qualname__ = base.__name__
    return Loader


unsloth = _import_unsloth()
FastLanguageModel = _for_several_processes(unsloth.FastLanguageModel)
FastModel = _for_several_processes(unsloth.FastModel)
