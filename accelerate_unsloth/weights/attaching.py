"""Moves the parameters of layers to memory that ranks share, and makes parameters of what is there, on every rank alike."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import nn

from . import SharedTensor
from .copying import Source, TensorSource
from .decoder import DecoderLayer
from .fetching import FetchedLayer, FetchedTensor, Fetcher, absent
from .layout import Piece
from .peer_memory import DeviceMemory, PeerMemory


class Store(Protocol):
    """Where a rank puts what other ranks of its node read: shared memory, or that of its GPU."""

    def put(self, tensors: list[torch.Tensor]) -> list[int]:
        """Write tensors behind one another, and return their offsets in bytes."""


@dataclass(frozen=True)
class Found:
    """
    What one rank has moved, as another rank or itself finds it.

    Args:
        pieces (`list[Piece]`): In the order of their layers, the large ones of a layer first.
        memory (`torch.Tensor`): The shared memory, of type `uint8`.
        own (`DeviceMemory`, *optional*): That of this rank, if it holds the large pieces.
        peer (`PeerMemory`, *optional*): That of another rank, if it holds them.
        is_own (`bool`, *optional*, defaults to `False`): Whether this rank has moved them.
    """

    pieces: list[Piece]
    memory: torch.Tensor
    own: DeviceMemory | None = None
    peer: PeerMemory | None = None
    is_own: bool = False

    def stored(self, piece: Piece) -> torch.Tensor | None:
        """Return a large piece as a tensor; `None` if another GPU holds it."""
        if self.own is not None:
            return piece.of_bytes(self.own.view(piece.offset, piece.end))
        return None if self.peer is not None else piece.view(self.memory)

    def source(self, begin: int, end: int) -> Source:
        """Return the bytes of a layer, for copies."""
        if self.peer is not None:
            return self.peer.source(begin, end)
        return TensorSource(self.own.view(begin, end) if self.own is not None else self.memory[begin:end])


def move(model: nn.Module, layer: int, names: list[str], memory: Store, large_memory: Store) -> list[Piece]:
    """Write parameters of a layer to `large_memory`, small ones to `memory`, and give up their own memory."""
    parameters, pieces = {name: model.get_parameter(name) for name in names}, []

    def write(store: Store, tensors: dict[str, torch.Tensor], parameter: str = "") -> None:
        offsets = store.put([*tensors.values()]) if tensors else []
        for (name, tensor), offset in zip(tensors.items(), offsets, strict=True):
            pieces.append(Piece.of(name, parameter or name, offset, tensor, layer))

    write(large_memory, {name: p.data for name, p in parameters.items() if p.dim() > 1})
    write(memory, {name: p.data for name, p in parameters.items() if p.dim() < 2})
    for name, parameter in parameters.items():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            write(memory, {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}, name)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return pieces


class Attachment:
    """
    The parameters that were made of what ranks have moved.

    Args:
        model ([`~torch.nn.Module`]): The model.
        layers (`list[DecoderLayer]`): Its layers.
        device (`torch.device`): Where it computes.
        fetches (`bool`): Whether layers that other ranks hold are copied to the device before they run.
        keeps_own (`bool`): Whether the layers of this rank stay on the device.

    Attributes:
        shared (`list[SharedTensor]`): Every shared tensor.
    """

    def __init__(
        self, model: nn.Module, layers: list[DecoderLayer], device: torch.device, fetches: bool, keeps_own: bool
    ):
        self._model, self._layers, self._device = model, layers, device
        self._fetches, self._keeps_own = fetches, keeps_own
        self.shared: list[SharedTensor] = []
        self._found: list[FetchedLayer] = []

    def add(self, found: Found) -> list[str]:
        """Make parameters of what one rank has moved, and return their names."""
        names = []
        stays = not self._fetches or (found.is_own and self._keeps_own)
        for layer, group in groupby(found.pieces, key=lambda piece: piece.layer):
            of_layer = [*group]
            states = defaultdict(dict)
            for piece in of_layer:
                if piece.is_state:
                    key = piece.name.removeprefix(f"{piece.parameter}.")
                    states[piece.parameter][key] = piece.view(found.memory).to(self._device, copy=True)
            parameters = [piece for piece in of_layer if not piece.is_state]
            for piece in parameters:
                self._set(piece, found, states.get(piece.name), stays)
            self._note_layer(layer, [piece for piece in parameters if not piece.is_small], found, stays)
            names += [piece.name for piece in parameters]
        return names

    def make_fetcher(self) -> Fetcher | None:
        """Return what copies the layers to the device, once all ranks were added; `None` where nothing is copied."""
        fetched = self._fetches and any(not layer.stays for layer in self._found)
        return Fetcher(self._found, self._device) if fetched else None

    def _set(self, piece: Piece, found: Found, state: dict | None, stays: bool) -> None:
        """Set a parameter of the model: the shared copy, a copy of its own, or one that is fetched."""
        module, name = self._owner(piece)
        if piece.is_small:
            value = piece.view(found.memory).to(self._device, copy=True)
        else:
            stored = found.stored(piece)
            self.shared.append(SharedTensor(module, name, stored, found.is_own))
            value = stored if stays else absent(piece.name, piece.shape, piece.torch_dtype, self._device)
        setattr(module, name, _parameter(value, state, module))

    def _note_layer(self, index: int, large: list[Piece], found: Found, stays: bool) -> None:
        if not large:
            return
        begin, end = large[0].offset, large[-1].end
        tensors = [FetchedTensor(*self._owner(piece), piece.name, piece.offset - begin) for piece in large]
        layer = self._model.get_submodule(self._layers[index].path)
        self._found.append(FetchedLayer(index, layer, found.source(begin, end), tuple(tensors), stays))

    def _owner(self, piece: Piece) -> tuple[nn.Module, str]:
        path, _, name = piece.name.rpartition(".")
        return self._model.get_submodule(path), name


def _parameter(value: torch.Tensor, state: dict[str, torch.Tensor] | None, module: nn.Module) -> nn.Parameter:
    if state is None:
        parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        from bitsandbytes.nn import Params4bit

        parameter = Params4bit.from_prequantized(value, state, device=value.device, module=module)
    parameter._is_hf_initialized = True  # or transformers would draw it at random
    return parameter
