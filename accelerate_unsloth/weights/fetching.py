"""
Copies each layer's frozen weights to the device just before the layer runs, in the forward and in the backward.

A parameter keeps its identity, shape and type: while its layer is away it has no memory, and reading it raises an error;
while its layer is in use it is a view of a slot. Kernels that hold the parameter for their backward, as Unsloth's do,
therefore find the weights of the right layer. What PyTorch saves for a backward are views, which would read whatever
layer is in the slot by then; so views of a slot are saved as a place, and made again when the backward needs them. The
price is a call for each tensor that a layer saves.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..memory.estimate import FETCHED_LAYERS
from .copying import Source, StreamCopier
from .layout import rounded_up
from .placement import VARIABLE
from .slots import SlotPool

# An attribute of modules that hold fetched weights.
_FETCH = "_accelerate_unsloth_fetch"


def fetch_weights_of(module: nn.Module) -> bool:
    """
    Let the weights of a module, or of the one that its adapter wraps, be there until another layer is used.

    Returns:
        `bool`: whether they are fetched.
    """
    fetch = getattr(getattr(module, "base_layer", module), _FETCH, None)
    if fetch is not None:
        fetch()
    return fetch is not None


@dataclass(frozen=True)
class FetchedTensor:
    """A parameter of `module`, and where it is in the bytes of its layer."""

    module: nn.Module
    name: str
    full_name: str
    offset: int  # bytes

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class FetchedLayer:
    """A decoder layer, its bytes, and its parameters in them."""

    index: int
    module: nn.Module
    source: Source
    tensors: tuple[FetchedTensor, ...]
    stays: bool = False  # its parameters are its weights all the time

    def __deepcopy__(self, memo):
        return self  # hooks of a copied model fetch for the original


@dataclass(frozen=True)
class _Place:
    """A view of a slot, as a backward saves it."""

    layer: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # bytes


@dataclass
class Fetcher:
    """
    Fetches layers for a model whose decoder layers are given, through hooks on them.

    Args:
        layers (`list[FetchedLayer]`): All layers; parameters of those that are copied are [`absent`].
        device (`torch.device`): Where they are computed.
    """

    layers: list[FetchedLayer]
    device: torch.device
    _shown: dict[int, int] = field(default_factory=dict)  # slot -> layer whose parameters are views of it
    _running: list = field(default_factory=list)  # of the layer that runs: what to close, and its first autograd node
    _keeps_no_views: set[int] = field(default_factory=set)  # layers whose custom functions were looked at

    def __post_init__(self):
        sources = {layer.index: layer.source for layer in self.layers if not layer.stays}
        largest = max(source.nbytes for source in sources.values())
        nbytes = rounded_up(largest)  # or they could not be viewed as any type
        self._slots = [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(FETCHED_LAYERS)]
        self._slot_at = {slot.data_ptr(): index for index, slot in enumerate(self._slots)}
        self._layer = {layer.index: layer for layer in self.layers}
        self._pool = SlotPool([*sources], FETCHED_LAYERS, StreamCopier(sources, self._slots))
        # As `absent` made them, or the weights of a layer that stays.
        self._away = {layer.index: [tensor.parameter.data for tensor in layer.tensors] for layer in self.layers}
        for layer in self.layers:
            self._install_hooks(layer)

    def __deepcopy__(self, memo):
        return self

    def use(self, index: int, forward: bool = True) -> int | None:
        """Let the parameters of a layer be its weights, until another layer is used; return its slot, if it is in one."""
        slot = self._pool.use(index, forward)
        for other, shown in list(self._shown.items()):
            if self._pool.contents[other] != shown:
                self._hide(self._shown.pop(other))
        if slot is not None and slot not in self._shown:
            self._shown[slot] = index
            for tensor, away in zip(self._layer[index].tensors, self._away[index], strict=True):
                tensor.parameter.data = self._view(slot, away.dtype, away.shape, away.stride(), tensor.offset)
        return slot

    def _hide(self, index: int) -> None:
        for tensor, away in zip(self._layer[index].tensors, self._away[index], strict=True):
            tensor.parameter.data = away

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the parameters of all layers be the copies on the host while the body runs, in which no layer may run."""
        for layer in self.layers:
            on_host = layer.source.on_host()
            for tensor, away in zip(layer.tensors, self._away[layer.index], strict=True):
                stored = on_host[tensor.offset : tensor.offset + away.nbytes]
                tensor.parameter.data = stored.view(away.dtype).view(away.shape).data
        try:
            yield
        finally:
            self._shown.clear()
            for layer in self.layers:
                self._hide(layer.index)

    def _view(self, slot: int, dtype, shape, stride, offset_bytes: int) -> torch.Tensor:
        typed = self._slots[slot].view(dtype)
        return torch.as_strided(typed, shape, stride, offset_bytes // dtype.itemsize).data

    # ---- Hooks ----

    def _install_hooks(self, layer: FetchedLayer) -> None:
        layer.module.register_forward_pre_hook(functools.partial(self._before_layer, layer))
        layer.module.register_forward_hook(functools.partial(self._after_layer, layer), always_call=True)
        for tensor in layer.tensors:
            setattr(tensor.module, _FETCH, functools.partial(self.use, layer.index))

    def _before_layer(self, layer: FetchedLayer, module, args) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # a recomputation
        self.use(layer.index, forward=not in_backward)
        if module.training and torch.is_grad_enabled():
            self._check_frozen(layer)
        # Recomputed layers save nothing here: their views live from the recomputation to the backward right after it.
        recomputes = getattr(module, "gradient_checkpointing", False) and module.training
        saving = ExitStack()
        if torch.is_grad_enabled() and not recomputes and not layer.stays:
            saving.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self._running.append((saving, torch.autograd._get_sequence_nr()))

    def _after_layer(self, layer: FetchedLayer, module, args, output) -> None:
        """Also called after an error, without an output."""
        if not self._running:  # the error was before the layer
            return
        saving, first_node = self._running.pop()
        saving.close()
        outputs = [output] if isinstance(output, torch.Tensor) else [*(output or ())]
        outputs = [value for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
        if not outputs:
            return
        if (
            not layer.stays
            and layer.index not in self._keeps_no_views
            and not self._keep_parameters(layer, outputs, first_node)
        ):
            self._keeps_no_views.add(layer.index)
        # Its gradient is complete before anything of the layer runs backward.
        outputs[0].register_hook(lambda gradient: self._before_backward(layer))

    def _before_backward(self, layer: FetchedLayer) -> None:
        self.use(layer.index, forward=False)

    def _keep_parameters(self, layer: FetchedLayer, outputs: list[torch.Tensor], first_node: int) -> bool:
        """
        Let custom functions of a layer keep parameters where they keep views of a slot; return whether any did.

        What a `torch.autograd.Function` keeps as an attribute no hook of PyTorch sees, also under checkpointing that is not
        reentrant. bitsandbytes keeps a view of a 4-bit weight (0.50, `MatMul4Bit.forward`); Unsloth's kernels keep parameters.

        Raises:
            RuntimeError: for a view that is no whole parameter.
        """
        found = False
        for node in _nodes_since(outputs, first_node):
            for name, kept in vars(node).items() if hasattr(node, "__dict__") else ():
                values = kept if isinstance(kept, (tuple, list)) else [kept]
                replaced = [self._parameter_of(value, layer, node) for value in values]
                if any(new is not old for new, old in zip(replaced, values, strict=True)):
                    found = True
                    setattr(node, name, type(kept)(replaced) if isinstance(kept, (tuple, list)) else replaced[0])
        return found

    def _parameter_of(self, value, layer: FetchedLayer, node):
        """Return the parameter that a view of a slot is; any other value as it is."""
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return value
        if value.untyped_storage().data_ptr() not in self._slot_at:
            return value
        for tensor in layer.tensors:
            whole = tensor.parameter
            if (value.data_ptr(), value.shape, value.dtype) == (whole.data_ptr(), whole.shape, whole.dtype):
                return whole
        raise RuntimeError(
            f"{type(node).__name__} keeps a part of a weight of decoder layer {layer.index} for its backward, in which that memory "
            f"may hold another layer. Set {VARIABLE}=replicated."
        )

    def _pack(self, tensor: torch.Tensor):
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None:
            return tensor.detach()  # a graph that holds its own output would never be freed
        return _Place(
            self._shown[slot], tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset() * tensor.itemsize
        )

    def _unpack(self, saved):
        if not isinstance(saved, _Place):
            return saved
        slot = self.use(saved.layer, forward=False)
        return self._view(slot, saved.dtype, saved.shape, saved.stride, saved.offset)

    def _check_frozen(self, layer: FetchedLayer) -> None:
        for tensor in layer.tensors:
            if tensor.parameter.requires_grad:
                raise ValueError(
                    f"{tensor.full_name} is trained, but the weights of its layer are copied to the device and never back. "
                    f"Train adapters only, or set {VARIABLE}=replicated."
                )


def _nodes_since(outputs: list[torch.Tensor], first: int) -> Iterator[torch.autograd.graph.Node]:
    """Yield the nodes of a graph that were made since the node number `first`."""
    left, seen = [output.grad_fn for output in outputs], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen and node._sequence_nr() >= first:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


def absent(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor without memory: its shape and type are there, and reading it raises an error with the name."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    # torch (2.11 to 2.14) has it for its own CUDA graphs. Without it a kernel would read address 0.
    torch._C._set_storage_access_error_msg(
        tensor,
        f"{name} is on this device only while its layer runs, because the frozen weights are stored once per node, and "
        f"something else reads it. Set {VARIABLE}=replicated.",
    )
    return tensor
