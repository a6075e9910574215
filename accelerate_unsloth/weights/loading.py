"""
Loads each decoder layer once per node.

transformers reads a checkpoint in one function, which takes a dictionary of tensors that are not read yet. Here it is
called once per layer, and only for the layers that this rank owns. So renaming, conversion and quantization stay those of
transformers, a layer of another rank is never read, and a process holds one layer at most besides what it keeps. The bytes
of each layer move to memory that the ranks of the node share. Cost: one exchange of the layers' addresses.
"""

import ctypes
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..launch.channel import channel
from ..launch.topology import topology
from ..patches import patched
from . import PlacedWeights, SharedTensor, attach, placement
from .copying import pin
from .decoder import DecoderLayer, find_layers
from .fetching import FetchedLayer, FetchedTensor, Fetcher, absent
from .layout import Piece
from .shared_memory import SharedMemory, mapped

# bitsandbytes NF4 with double quantization, in bytes per value (`memory/budget.py`).
_4BIT_BYTES = 0.516


@contextmanager
def placing(requested: str, device: str, trains_all: bool = False) -> Iterator[None]:
    """
    Let `from_pretrained` of transformers share the decoder layers of a node, where `requested` and the facts say so.

    Args:
        requested (`str`): The plugin's `frozen_weights`.
        device (`str`): Where the model computes, such as `"cuda:1"`.
        trains_all (`bool`, *optional*, defaults to `False`): Whether the weights of the layers are trained.

    Raises:
        ValueError: for a placement that is not possible.
        MemoryError: if the model does not fit.
    """
    from transformers import modeling_utils

    load, warm_up = modeling_utils.convert_and_load_state_dict_in_model, modeling_utils.caching_allocator_warmup

    def resolve(model, layers: list[DecoderLayer]) -> placement.PlacementChoice:
        return placement.resolve(requested, _facts(model, layers, device, trains_all))

    def warm_up_if_replicated(model, *args, **kwargs):
        """It would allocate the whole model on the GPU before anything is read."""
        if resolve(model, find_layers(model)).mode == "replicated":
            warm_up(model, *args, **kwargs)

    def place_and_load(model, state_dict, load_config, disk_offload_index=None):
        layers = find_layers(model)
        choice = resolve(model, layers)
        if choice.mode == "replicated":
            attach(model, PlacedWeights(choice))
            return load(model, state_dict, load_config, disk_offload_index)
        loading = _Loading(load, model, load_config, layers, torch.device(device))
        info = loading.run(state_dict)
        attach(model, PlacedWeights(choice, tuple(loading.shared), loading.fetcher))
        return info, disk_offload_index

    with patched(
        modeling_utils,
        convert_and_load_state_dict_in_model=place_and_load,
        caching_allocator_warmup=warm_up_if_replicated,
    ):
        yield


def computes_with_shared_copy(device: torch.device) -> bool:
    """Return whether the shared copy itself is what layers on a device compute with."""
    return device.type == "cpu"


def _facts(model, layers: list[DecoderLayer], device: str, trains_all: bool) -> placement.Facts:
    sizes = {name: _loaded_bytes(model, name, p) for name, p in model.named_parameters()}
    layer_bytes = sum(sizes[name] for layer in layers for name in layer.parameters)
    cannot_share = "" if layers else f"the decoder layers of {type(model).__name__} were not found"
    return placement.Facts(
        layer_bytes=int(layer_bytes),
        other_bytes=int(sum(sizes.values()) - layer_bytes),
        local_world_size=topology().local_world_size,
        host_bytes=placement.host_bytes(),
        on_gpu=device != "cpu",
        cannot_share="all weights are trained, and each rank changes its own" if trains_all else cannot_share,
    )


def _loaded_bytes(model, name: str, parameter: torch.Tensor) -> float:
    """Return the bytes of a parameter of a model on the meta device, once it is loaded."""
    is_4bit = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (_4BIT_BYTES if is_4bit else parameter.element_size())


class _Loading:
    """One load of a model, whose parameters are on the meta device."""

    def __init__(self, load: Callable, model, load_config, layers: list[DecoderLayer], device: torch.device):
        self._load, self._model, self._config, self._layers = load, model, load_config, layers
        self._layer_of = {name: index for index, layer in enumerate(layers) for name in layer.parameters}
        self._device, self._fetches = device, not computes_with_shared_copy(device)
        # Layers go to the host at once. Only a GPU quantizes to the bits of a GPU, and fast enough.
        quantizes = load_config.hf_quantizer is not None and not load_config.hf_quantizer.pre_quantized
        self._layer_config = load_config if quantizes else replace(load_config, device_map={"": "cpu"})
        self.shared: list[SharedTensor] = []
        self.fetcher: Fetcher | None = None

    def run(self, state_dict: dict[str, Any]) -> Any:
        """Return what transformers reports of a load."""
        with SharedMemory() as memory:
            info, pieces = self._load_own(self._by_layer(state_dict), memory)
            own = {
                "node": topology().node,
                "address": memory.address(),
                "pieces": [piece.to_json() for piece in pieces],
            }
            everyone = channel().gather("frozen weights loaded", own | _problems(info))
            fetched = []
            for rank, sent in enumerate(everyone):
                if sent["node"] == topology().node:
                    _add_problems(info, sent)
                    found = [Piece.from_json(entry) for entry in sent["pieces"]]
                    memory_of_rank = mapped(sent["address"], private=not self._fetches)
                    if self._device.type == "cuda":
                        pin(memory_of_rank)
                    fetched += self._attach(found, memory_of_rank, info, rank == topology().rank)
            channel().gather("frozen weights mapped", True)  # before any rank closes its memory
        if self._fetches:
            self.fetcher = Fetcher(fetched, self._device)
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what conversions have used and glibc has kept
        return info

    def _by_layer(self, state_dict: dict[str, Any]) -> dict[int | None, dict[str, Any]]:
        """Split a checkpoint by the layer that its tensors become parameters of; `None` for all others."""
        from transformers import core_model_loading as loading

        mapping = self._config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        expected, prefix = self._model.state_dict(), self._model.base_model_prefix
        groups = defaultdict(dict)
        for key, tensor in state_dict.items():
            renamed, _ = loading.rename_source_key(key, renamings, converters, prefix, expected)
            if renamed not in expected and key in expected:
                renamed, _ = loading.rename_source_key(key, [], [], prefix, expected)
            groups[self._layer_of.get(renamed)][key] = tensor
        return groups

    def _load_own(self, groups: dict[int | None, dict], memory: SharedMemory) -> tuple[Any, list[Piece]]:
        """Load what every rank holds, and move the layers of this rank to `memory`, one by one."""
        from transformers.utils import logging

        place, number, pieces = topology(), len(self._layers), []
        own = [index for index in range(number) if index * place.local_world_size // number == place.local_rank]
        # One tensor at a time: glibc keeps up to 64 MiB of each thread that has converted some (2.36, `malloc_trim`).
        with _constant_state_dict(self._model), patched(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            info = self._call(groups.get(None, {}), self._config)
            for index in logging.tqdm(own, desc="Loading layers"):
                with _without_progress_bars():
                    part = self._call(groups.get(index, {}), self._layer_config)
                left = part.missing_keys | {name for name, *_ in part.mismatched_keys}
                names = [name for name in self._layers[index].parameters if name not in left]
                pieces += self._move(index, names, memory)
                info.missing_keys &= part.missing_keys
                _add_problems(info, _problems(part))
        return info, pieces

    def _call(self, group: dict[str, Any], load_config) -> Any:
        return self._load(self._model, group, load_config)[0]

    def _move(self, index: int, names: list[str], memory: SharedMemory) -> list[Piece]:
        """Write parameters of a layer to `memory`, large ones first, and give up their own memory."""
        pieces, parameters = [], {name: self._model.get_parameter(name) for name in names}

        def write(name: str, parameter: str, tensor: torch.Tensor) -> None:
            pieces.append(Piece.of(name, parameter, memory.append(tensor), tensor, index))

        for name, parameter in sorted(parameters.items(), key=lambda item: item[1].dim() < 2):
            write(name, name, parameter.data)
        for name, parameter in parameters.items():
            state = getattr(parameter, "quant_state", None)
            for key, tensor in state.as_dict(packed=True).items() if state is not None else ():
                write(f"{name}.{key}", name, tensor)
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return pieces

    def _attach(self, pieces: list[Piece], memory: torch.Tensor, info: Any, is_own: bool) -> Iterator[FetchedLayer]:
        """Make parameters of what a rank has loaded, and return its layers."""
        by_layer = defaultdict(list)
        for piece in pieces:
            by_layer[piece.layer].append(piece)
        for index, of_layer in by_layer.items():
            states = defaultdict(dict)
            for piece in of_layer:
                if piece.is_state:
                    key = piece.name.removeprefix(f"{piece.parameter}.")
                    states[piece.parameter][key] = piece.view(memory).to(self._device, copy=True)
            large = [piece for piece in of_layer if not piece.is_small]
            begin, end = min(piece.offset for piece in large), max(piece.end for piece in large)
            tensors = []
            for piece in of_layer:
                if not piece.is_state:
                    module, name = self._set(piece, piece.view(memory), states.get(piece.name), is_own)
                    info.missing_keys.discard(piece.name)
                    if not piece.is_small:
                        tensors.append(FetchedTensor(module, name, piece.name, piece.offset - begin))
            layer = self._model.get_submodule(self._layers[index].path)
            yield FetchedLayer(index, layer, memory[begin:end], tuple(tensors))

    def _set(self, piece: Piece, stored: torch.Tensor, state: dict | None, is_own: bool) -> tuple[nn.Module, str]:
        """Set a parameter of the model: the shared copy, a copy of its own, or one that is fetched."""
        path, _, name = piece.name.rpartition(".")
        module, value = self._model.get_submodule(path), stored
        if piece.is_small:
            value = stored.to(self._device, copy=True)
        else:
            self.shared.append(SharedTensor(module, name, stored, is_own))
            if self._fetches:
                value = absent(piece.name, stored.shape, stored.dtype, self._device)
        setattr(module, name, _parameter(value, state, module))
        return module, name


def _parameter(value: torch.Tensor, state: dict[str, torch.Tensor] | None, module: nn.Module) -> nn.Parameter:
    if state is None:
        parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        from bitsandbytes.nn import Params4bit

        parameter = Params4bit.from_prequantized(value, state, device=value.device, module=module)
    parameter._is_hf_initialized = True  # or transformers would draw it at random
    return parameter


@contextmanager
def _constant_state_dict(model) -> Iterator[None]:
    """Let every call see the model as it was before the first: names, shapes and types on the meta device."""
    names = model.state_dict()
    with patched(model, state_dict=lambda *args, **kwargs: names):
        yield


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _problems(info: Any) -> dict[str, Any]:
    """Return what transformers reports of tensors that it could not load, as a message between ranks carries it."""
    return {
        "unexpected": sorted(info.unexpected_keys),
        "mismatched": sorted([name, [*found], [*wanted]] for name, found, wanted in info.mismatched_keys),
        "errors": list(info.error_msgs),
        "conversions": dict(info.conversion_errors),
    }


def _add_problems(info: Any, problems: dict[str, Any]) -> None:
    info.unexpected_keys |= {*problems["unexpected"]}
    info.mismatched_keys |= {
        (name, torch.Size(found), torch.Size(wanted)) for name, found, wanted in problems["mismatched"]
    }
    info.error_msgs += [error for error in problems["errors"] if error not in info.error_msgs]
    info.conversion_errors |= problems["conversions"]
