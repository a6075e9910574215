"""Unsloth's loaders for several processes: each rank loads onto its own GPU, and only rank 0 prints and saves."""

import functools
from tempfile import TemporaryDirectory

import torch

from ..launch.channel import channel
from ..launch.topology import topology
from ..patches import patch_log, patched
from ..plugin import UnslothPlugin
from ..reliability import rank0_writes
from ..reporting.verbosity import muted_prints
from ..weights import placed_weights
from ..weights.decoder import find_layers
from ..weights.fetching import fetch_weights_of
from ..weights.loading import placing
from . import checks
from .garbage import frozen_import

try:
    with muted_prints(), frozen_import():
        import unsloth
except Exception as error:
    raise ImportError(
        f"Unsloth could not be imported on a machine with GPUs ({type(error).__name__}: {error}). Run "
        "`python -c 'import unsloth'` to see why and fix it, or set ACCELERATE_UNSLOTH_ENGINE=reference for "
        "transformers and PEFT without Unsloth's kernels."
    ) from error

_ASKED_FOR = "_accelerate_unsloth_checkpointing_asked"  # read by trainers/planner.py


def only_on_own_gpu(set_cache, own_index: int):
    """
    Wrap `set_cache(self, seq_len, device, dtype)` so that it does nothing for GPUs other than `own_index`.

    Unsloth's rotary embeddings build their caches on every visible GPU (unsloth 2026.10.6, `models/llama.py`,
    `models/gemma.py`). Every rank would open a CUDA context on each of them. Delete this when only the current GPU is
    used.
    """

    @functools.wraps(set_cache)
    def on_own_gpu(self, seq_len, device, dtype):
        if torch.device(device).index in (None, own_index):
            set_cache(self, seq_len, device, dtype)

    return on_own_gpu


def _keep_caches_on_own_gpu() -> None:
    name = "_set_cos_sin_cache"
    for kind in (*vars(unsloth.models.llama).values(), *vars(unsloth.models.gemma).values()):
        if isinstance(kind, type) and name in vars(kind) and not patch_log.holds(kind, name):
            patch_log.patch(kind, name, only_on_own_gpu(vars(kind)[name], torch.cuda.current_device()))


def to_own_file(offload):
    """
    Wrap `offload(W, model, name, ...)` so that the file that it writes and maps is of this process alone.

    Unsloth offloads embeddings that are trained to a file by the name of the model, in the model's folder if it has one
    (unsloth 2026.10.9, `models/_utils.py: offload_to_disk`). Ranks would write it while others read it. The mapped file is
    deleted at once, so nothing stays behind. Delete this when each process writes to its own file.
    """

    @functools.wraps(offload)
    def offloaded(W, model, name, *args, **kwargs):
        with TemporaryDirectory(prefix="accelerate_unsloth-") as folder, patched(model.config, _name_or_path=folder):
            return offload(W, model, name, *args, **kwargs)

    return offloaded


def once_per_node(quantize):
    """
    Wrap `quantize(model_name, fp8_mode, ...)`, which returns a folder, so that the first process of each node runs it alone.

    For `load_in_fp8=True` Unsloth writes the model in fp8 into a folder for temporary files on every rank (unsloth 2026.10.9,
    `models/loader_utils.py: _offline_quantize_to_fp8`), and keeps the first result. N ranks would load the 16-bit model
    at once and need the space N times. Delete this when one rank does it.
    """

    @functools.wraps(quantize)
    def quantized(*args, **kwargs):
        return channel().run_on_local_main("quantizing to fp8", lambda: quantize(*args, **kwargs))

    return quantized


class _FetchingDecoder:
    """
    Tells which layer Unsloth's decoding of single tokens comes to.

    It reads weights without calling the layers, but calls `enter` and `leave` of this attribute of the list of layers (unsloth
    2026.10.9, `models/llama.py: LlamaModel_fast_forward_inference`), which is there for its own offloading.
    """

    def __init__(self, fetcher):
        self._fetcher = fetcher

    def enter(self, index: int) -> None:
        self._fetcher.use(index)

    def leave(self, index: int) -> None:
        """Do nothing: the next layer replaces this one."""


def _let_others_fetch(model) -> None:
    placed = placed_weights(model)
    if placed is not None and placed.fetcher is not None:
        layers = model.get_submodule(find_layers(model)[0].path.rpartition(".")[0])
        layers._unsloth_block_swap = _FetchingDecoder(placed.fetcher)
        _fetch_before_merging()


def _fetch_before_merging() -> None:
    """Let Unsloth's merging, which reads weights one by one, find those of a layer that is away (2026.10.9, `save.py`)."""
    merge = unsloth.save._merge_lora

    @functools.wraps(merge)
    def fetched_and_merged(layer, *args, **kwargs):
        if not fetch_weights_of(layer):
            return merge(layer, *args, **kwargs)
        weight, bias = merge(layer, *args, **kwargs)
        # A layer without adapters is returned as it is, and would be away when it is written.
        return weight.detach().clone() if isinstance(weight, torch.nn.Parameter) else weight, bias

    if not patch_log.holds(unsloth.save, "_merge_lora"):
        patch_log.patch(unsloth.save, "_merge_lora", fetched_and_merged)


def _for_several_processes(base):
    """
    Return a subclass of an Unsloth loader whose models are on this rank's GPU and are saved by rank 0 only.

    Unsloth places a model on `LOCAL_RANK` by itself (unsloth 2026.10.6, `loader_utils.prepare_device_map`), so the
    placement is only checked.
    """

    class Loader(base):
        @staticmethod
        @functools.wraps(base.from_pretrained)
        def from_pretrained(*args, **kwargs):
            checks.check_loading(args[0] if args else kwargs.get("model_name"), kwargs)
            placement = UnslothPlugin().frozen_weights
            trains_all = bool(kwargs.get("full_finetuning"))
            with muted_prints(), placing(placement, checks.this_device(), trains_all):
                model, tokenizer = base.from_pretrained(*args, **kwargs)
            _let_others_fetch(model)
            checks.note_stock_trainers()
            if topology().world_size > 1:
                checks.check_placement((p.device for p in model.parameters()), checks.this_device())
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


if topology().world_size > 1:
    _keep_caches_on_own_gpu()
    helpers = unsloth.models._utils
    patch_log.patch(helpers, "offload_to_disk", to_own_file(helpers.offload_to_disk))
    loader = unsloth.models.loader
    patch_log.patch(loader, "_offline_quantize_to_fp8", once_per_node(loader._offline_quantize_to_fp8))
# The package exports the first two; unmodified scripts may use any.
_NAMES = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel")
LOADERS = {name: _for_several_processes(getattr(unsloth, name)) for name in _NAMES if hasattr(unsloth, name)}
FastLanguageModel, FastModel = LOADERS["FastLanguageModel"], LOADERS["FastModel"]
