"""Moves the parameters of layers to shared memory, and makes parameters of what is there, on every rank alike."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import nn

from . import SharedTensor
from .decoder import DecoderLayer
from .fetching import FetchedLayer, FetchedTensor, Fetcher, absent
from .layout import Piece
from .shared_memory import SharedMemory


def move(model: nn.Module, layer: int, names: list[str], memory: SharedMemory) -> list[Piece]:
    """Write parameters of a layer to `memory`, large ones first, and give up their own memory."""
    parameters, pieces = {name: model.get_parameter(name) for name in names}, []

    def write(name: str, parameter: str, tensor: torch.Tensor) -> None:
        pieces.append(Piece.of(name, parameter, memory.append(tensor), tensor, layer))

    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].dim() < 2):
        write(name, name, parameter.data)
    for name, parameter in parameters.items():
        state = getattr(parameter, "quant_state", None)
        for key, tensor in state.as_dict(packed=True).items() if state is not None else ():
            write(f"{name}.{key}", name, tensor)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return pieces


class Attachment:
    """
    The parameters that were made of shared memory.

    Args:
        model ([`~torch.nn.Module`]): The model.
        layers (`list[DecoderLayer]`): Its layers.
        device (`torch.device`): Where it computes.
        fetches (`bool`): Whether layers are copied to the device before they run.

    Attributes:
        shared (`list[SharedTensor]`): Every shared tensor.
    """

    def __init__(self, model: nn.Module, layers: list[DecoderLayer], device: torch.device, fetches: bool):
        self._model, self._layers, self._device, self._fetches = model, layers, device, fetches
        self.shared: list[SharedTensor] = []
        self._found: list[FetchedLayer] = []

    def add(self, pieces: Iterable[Piece], memory: torch.Tensor, is_own: bool) -> list[str]:
        """Make parameters of what one rank has moved to `memory`, in its order, and return their names."""
        names = []
        for layer, group in groupby(pieces, key=lambda piece: piece.layer):
            of_layer = [*group]
            states = defaultdict(dict)
            for piece in of_layer:
                if piece.is_state:
                    key = piece.name.removeprefix(f"{piece.parameter}.")
                    states[piece.parameter][key] = piece.view(memory).to(self._device, copy=True)
            parameters = [piece for piece in of_layer if not piece.is_state]
            for piece in parameters:
                self._set(piece, piece.view(memory), states.get(piece.name), is_own)
            self._note_layer(layer, [piece for piece in parameters if not piece.is_small], memory)
            names += [piece.name for piece in parameters]
        return names

    def make_fetcher(self) -> Fetcher | None:
        """Return what copies the layers to the device, once all ranks were added; `None` where nothing is copied."""
        return Fetcher(self._found, self._device) if self._fetches and self._found else None

    def _set(self, piece: Piece, stored: torch.Tensor, state: dict | None, is_own: bool) -> None:
        """Set a parameter of the model: the shared copy, a copy of its own, or one that is fetched."""
        module, name = self._owner(piece)
        value = stored
        if piece.is_small:
            value = stored.to(self._device, copy=True)
        else:
            self.shared.append(SharedTensor(module, name, stored, is_own))
            if self._fetches:
                value = absent(piece.name, stored.shape, stored.dtype, self._device)
        setattr(module, name, _parameter(value, state, module))

    def _note_layer(self, index: int, large: list[Piece], memory: torch.Tensor) -> None:
        if not large:
            return
        begin, end = large[0].offset, large[-1].end
        tensors = [FetchedTensor(*self._owner(piece), piece.name, piece.offset - begin) for piece in large]
        layer = self._model.get_submodule(self._layers[index].path)
        self._found.append(FetchedLayer(index, layer, memory[begin:end], tuple(tensors)))

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
