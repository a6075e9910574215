"""Unsloth's loaders, one per rank: imported first, quiet on all ranks but one, and held to this rank's GPU."""

import functools

import torch

from ..launch.topology import topology
from ..patches import ledger
from ..reliability import rank0_writes
from ..reporting.verbosity import muted_prints
from . import check_model_name, environment, placement

_ASKED_FOR = "_accelerate_unsloth_checkpointing_asked"  # read by trainers/planning.py


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


def only_on_own_gpu(set_cache, own_index: int):
    """
    `set_cache(self, seq_len, device, dtype)` that passes over other GPUs than `own_index`.

    Unsloth's rotary embeddings build their caches on every visible GPU (unsloth 2026.10.6, `models/llama.py`,
    `models/gemma.py`), which would open a CUDA context of every rank on each of them. Delete this when they build them
    on the current one.
    """

    @functools.wraps(set_cache)
    def on_own_gpu(self, seq_len, device, dtype):
        if torch.device(device).index in (None, own_index):
            set_cache(self, seq_len, device, dtype)

    return on_own_gpu


def _keep_caches_on_own_gpu() -> None:
    for module in (unsloth.models.llama, unsloth.models.gemma):
        for kind in list(vars(module).values()):
            if isinstance(kind, type) and "_set_cos_sin_cache" in vars(kind):
                own = only_on_own_gpu(kind._set_cos_sin_cache, torch.cuda.current_device())
                if not ledger.holds(kind, "_set_cos_sin_cache"):
                    ledger.patch(kind, "_set_cos_sin_cache", own)


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
            environment.check_loading_arguments(kwargs)
            placement.check_device_map(kwargs.get("device_map"), topology().world_size, placement.this_device())
            with muted_prints():
                model, tokenizer = base.from_pretrained(*args, **kwargs)
            if topology().world_size > 1:
                placement.check_placement((p.device for p in model.parameters()), placement.this_device())
            setattr(model, _ASKED_FOR, kwargs.get("use_gradient_checkpointing"))
            rank0_writes.guard(model)
            rank0_writes.guard(tokenizer)
            return model, tokenizer

        @staticmethod
        @functools.wraps(base.get_peft_model)
        def get_peft_model(model, *args, **kwargs):
            asked_for = kwargs.get("use_gradient_checkpointing", getattr(model, _ASKED_FOR, None))
            if asked_for == "auto":  # loaded with Unsloth's default, which the trainer may switch off
                kwargs.pop("use_gradient_checkpointing", None)  # the loader may have been given it instead
                asked_for = None
            with muted_prints():
                model = base.get_peft_model(model, *args, **kwargs)
            setattr(model, _ASKED_FOR, asked_for)
            rank0_writes.guard(model)
            return model

    Loader.__name__ = Loader.__qualname__ = base.__name__
    return Loader


unsloth = _import_unsloth()
if topology().world_size > 1:
    _keep_caches_on_own_gpu()
# The first two are ours by name as well; scripts that stay as they are may use any.
_NAMES = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel")
LOADERS = {name: _for_several_processes(getattr(unsloth, name)) for name in _NAMES if hasattr(unsloth, name)}
FastLanguageModel, FastModel = LOADERS["FastLanguageModel"], LOADERS["FastModel"]
