"""
Loads each decoder layer once per node.

A rank reads the layers that it owns (`checkpoint.py`) and moves their bytes to memory that the ranks of the node share; then
every rank makes parameters of all of them (`attaching.py`). No process holds more than one layer besides what it keeps.
Cost: one exchange of addresses.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from ..launch.channel import channel
from ..launch.topology import topology
from ..memory.budget import NF4_BYTES, NF4_PACKED_BYTES
from ..patches import patched
from . import PlacedWeights, attach, placement
from .attaching import Attachment, Found, Store, move
from .checkpoint import LayeredCheckpoint
from .copying import pin
from .decoder import DecoderLayer, find_layers
from .layout import Piece, as_bytes, from_bytes
from .peer_memory import DeviceMemory, PeerMemory, stay_while_read, why_no_copies
from .shared_memory import SharedMemory, mapped


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

    def facts(model, layers: list[DecoderLayer], device_map, quantizer) -> placement.Facts:
        why = "all weights are trained, and each rank changes its own" if trains_all else ""
        return _facts(model, layers, device, why or _why_not_shared(model, layers, device_map, quantizer))

    def warm_up_if_replicated(model, expanded_device_map, hf_quantizer):
        """It would allocate the whole model on the GPU before anything is read."""
        found = facts(model, find_layers(model), expanded_device_map, hf_quantizer)
        if placement.resolve(requested, found).mode == "replicated":
            warm_up(model, expanded_device_map, hf_quantizer)

    def place_and_load(model, state_dict, load_config, disk_offload_index=None):
        layers = find_layers(model)
        choice = _resolve(requested, facts(model, layers, load_config.device_map, load_config.hf_quantizer), device)
        if choice.mode == "replicated":
            attach(model, PlacedWeights(choice))
            return load(model, state_dict, load_config, disk_offload_index)
        checkpoint = LayeredCheckpoint(load, model, load_config, layers, state_dict)
        info, attached = _load_shared(checkpoint, model, layers, torch.device(device), choice.mode == "sharded")
        attach(model, PlacedWeights(choice, tuple(attached.shared), attached.make_fetcher()))
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


def _resolve(requested: str, facts: placement.Facts, device: str) -> placement.PlacementChoice:
    """Choose, with a try whether GPUs can copy from one another where that decides; all ranks of a node try together."""
    choice = placement.resolve(requested, facts)
    if choice.mode == "sharded" and (why := why_no_copies(torch.device(device))):
        return placement.resolve(requested, replace(facts, no_peer_copies=why))
    return choice


def _why_not_shared(model, layers: list[DecoderLayer], device_map, quantizer) -> str:
    """Return why the layers of a model cannot be shared, as a clause; empty if they can."""
    if not layers:
        return f"the decoder layers of {type(model).__name__} were not found"
    if len({str(device) for device in (device_map or {}).values()}) > 1:
        return "device_map spreads the model over several devices"
    if quantizer is not None and type(quantizer).__name__ != "Bnb4BitHfQuantizer":
        return f"quantization by {type(quantizer).__name__} is not supported"
    kinds = {type(model.get_parameter(name)).__name__ for layer in layers for name in layer.parameters}
    others = sorted(kinds - {"Parameter", "Params4bit"})
    return f"weights of the type {', '.join(others)} are not supported" if others else ""


def _facts(model, layers: list[DecoderLayer], device: str, cannot_share: str) -> placement.Facts:
    tied = getattr(model, "all_tied_weights_keys", {})  # on the meta device they are parameters of their own
    parameters = {name: p for name, p in model.named_parameters() if name not in tied}
    of_layers = [[parameters[name] for name in layer.parameters] for layer in layers]
    sizes = tuple(int(sum(map(_movable_bytes, of_layer))) for of_layer in of_layers)
    processes = topology().local_world_size
    return placement.Facts(
        layers=sizes,
        other_bytes=int(sum(map(_loaded_bytes, parameters.values())) - sum(sizes)),
        local_world_size=processes,
        host_bytes=placement.host_bytes(),
        device_bytes=None if device == "cpu" else placement.device_bytes(processes),
        cannot_share=cannot_share,
    )


def _loaded_bytes(parameter: torch.Tensor) -> float:
    """Return the bytes of a parameter of a model on the meta device, once it is loaded."""
    return parameter.numel() * (NF4_BYTES if _is_4bit(parameter) else parameter.element_size())


def _movable_bytes(parameter: torch.Tensor) -> float:
    """Return those that can be elsewhere: without the constants of quantization, biases and norms."""
    if parameter.dim() < 2:
        return 0
    return parameter.numel() * NF4_PACKED_BYTES if _is_4bit(parameter) else _loaded_bytes(parameter)


def _is_4bit(parameter: torch.Tensor) -> bool:
    return type(parameter).__name__ == "Params4bit"


def _load_shared(
    checkpoint: LayeredCheckpoint, model, layers: list[DecoderLayer], device: torch.device, keeps_own: bool
) -> tuple[Any, Attachment]:
    """
    Load the layers of this rank, and share all of the node; return what transformers reports, and what was attached.

    With `keeps_own` each rank holds its layers on its device.
    """
    fetches = not computes_with_shared_copy(device)
    attached, place = Attachment(model, layers, device, fetches, keeps_own), topology()
    on_gpu = DeviceMemory(device) if keeps_own and device.type == "cuda" else None
    with SharedMemory() as memory:
        own_layers = _own_layers(len(layers), keeps_own)
        pieces = _load_own(checkpoint, model, own_layers, memory, on_gpu or memory)
        table = memory.append(as_bytes(pieces))  # with many experts too long for a message
        addresses = {"address": memory.address(), "on_gpu": on_gpu.address() if on_gpu else None}
        own = {"table": table} | addresses | checkpoint.report()
        everyone = channel().gather("frozen weights loaded", own, place.node_ranks)
        for rank, sent in zip(place.node_ranks, everyone, strict=True):
            checkpoint.add_report(sent)
            of_rank = mapped(sent["address"], private=not fetches)
            if device.type == "cuda" and not on_gpu:
                pin(of_rank)
            is_own = rank == place.rank
            peer = PeerMemory(sent["on_gpu"], device) if on_gpu and not is_own else None
            pieces = from_bytes(of_rank[sent["table"] :])
            found = Found(pieces, of_rank, on_gpu if is_own else None, peer, is_own)
            checkpoint.info.missing_keys -= {*attached.add(found)}
        channel().gather("frozen weights mapped", True, place.node_ranks)  # before any rank closes its memory
    if on_gpu:
        stay_while_read()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what conversions have used and glibc has kept
    return checkpoint.info, attached


def _own_layers(number: int, keeps_own: bool) -> list[int]:
    """
    Return the layers that this rank loads: neighbours, which are in the same files, or those that it keeps.

    The position among the node's ranks counts, because launchers that show each process one GPU may give all of them the
    same local rank.
    """
    place = topology()
    position, processes = place.node_ranks.index(place.rank), len(place.node_ranks)
    if keeps_own:
        return [index for index in range(number) if placement.owner(index, processes) == position]
    return [index for index in range(number) if index * processes // number == position]


def _load_own(
    checkpoint: LayeredCheckpoint, model, layers: list[int], memory: SharedMemory, large_memory: Store
) -> list[Piece]:
    """Load what every rank holds, and move the layers of this rank to memory that others read, one by one."""
    from transformers.utils import logging

    pieces = []
    with checkpoint.opened():
        for index in logging.tqdm(layers, desc="Loading layers"):
            pieces += move(model, index, checkpoint.read_layer(index), memory, large_memory)
    return pieces
