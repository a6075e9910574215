"""
Frozen weights of the decoder layers, stored once per node.

With LoRA the base weights do not change, so ranks can share one copy and need no agreement during training. `placement`
chooses where the layers live, `loading` brings each of them there once per node, `shared_memory` holds them. Where the
shared copy is not what the device computes with, `fetching` copies each layer to the device before it runs; `peer_memory`
holds layers on the GPUs themselves.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from .placement import PlacementChoice

_ATTRIBUTE = "_accelerate_unsloth_weights"


@dataclass(frozen=True)
class SharedTensor:
    """A weight of `module` that the ranks of a node share."""

    module: Any  # `torch.nn.Module`
    name: str  # of the parameter in it
    stored: Any  # `torch.Tensor`: the shared copy; `None` where it is on the GPU of another rank
    is_own: bool  # whether this rank loaded it

    @property
    def parameter(self):
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class PlacedWeights:
    """Where the frozen weights of a loaded model live."""

    choice: PlacementChoice
    shared: tuple[SharedTensor, ...] = ()
    fetcher: Any = None  # `Fetcher`, where layers are copied to the device before they run

    def __deepcopy__(self, memo):
        return self  # the copy of a model has its own weights


def attach(model, placed: PlacedWeights) -> None:
    """Let [`placed_weights`] tell where the weights of a model live, also of one inside an adapter model."""
    setattr(model, _ATTRIBUTE, placed)


def placed_weights(model) -> PlacedWeights | None:
    """Return where the frozen weights of a model live; `None` if no engine of this package loaded it."""
    return getattr(model, _ATTRIBUTE, None)


def all_present(model) -> AbstractContextManager:
    """Return a context in which all weights of a model can be read on the CPU, and no layer may run."""
    placed = placed_weights(model)
    return placed.fetcher.stopped() if placed and placed.fetcher else nullcontext()
