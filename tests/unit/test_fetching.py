"""Layers whose weights are fetched before they run, in one process: gradients, errors, and what stays behind."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from accelerate_unsloth.memory.estimate import FETCHED_LAYERS as SLOTS
from accelerate_unsloth.weights.copying import TensorSource
from accelerate_unsloth.weights.fetching import FetchedLayer, FetchedTensor, Fetcher, absent

WIDTH, LAYERS = 8, 6
CPU = torch.device("cpu")


class Kernel(torch.autograd.Function):
    """A product that holds the parameter itself for its backward, as Unsloth's kernels do."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = weight
        return inputs @ weight.data.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.data, None


class ViewKernel(Kernel):
    """A product that holds a view of the parameter, as bitsandbytes does."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = None
        ctx.tensors = (None, weight.view(weight.shape))
        return inputs @ weight.data.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.tensors[1].data, None


class PartKernel(Kernel):
    """A product that holds something that is no whole parameter."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = weight.t()
        return inputs @ weight.data.t()


def product(inputs, weight):
    """Save a view of the weight, and the output."""
    return torch.tanh(inputs @ weight.t())


WAYS = {"views": product, "parameters": Kernel.apply, "a view in an attribute": ViewKernel.apply}


class Linear(nn.Linear):
    way = staticmethod(product)

    def forward(self, inputs):
        return self.way(inputs, self.weight)


class Layer(nn.Module):
    def __init__(self, way, calls_children=True):
        super().__init__()
        self.up, self.down = Linear(WIDTH, 16, bias=False), Linear(16, WIDTH, bias=False)
        self.up.way = self.down.way = way
        self.calls_children = calls_children
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.gradient_checkpointing = False

    def forward(self, hidden):
        if self.calls_children:
            return hidden + self.down(self.up(hidden)) + self.adapter(hidden)
        # As layers with a convolution do, which read its weight.
        return hidden + self.down.way(self.up.way(hidden, self.up.weight), self.down.weight) + self.adapter(hidden)


class Model(nn.Module):
    def __init__(self, way=product, calls_children=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(way, calls_children) for _ in range(LAYERS))
        for layer in self.layers:
            layer.up.requires_grad_(False)
            layer.down.requires_grad_(False)

    def forward(self, hidden):
        for layer in self.layers:
            if layer.gradient_checkpointing:
                hidden = torch.utils.checkpoint.checkpoint(
                    layer, hidden, use_reentrant=layer.gradient_checkpointing == 1
                )
            else:
                hidden = layer(hidden)
        return hidden


def fetched(model: Model, stays: tuple[int, ...] = ()) -> Fetcher:
    """Move the frozen weights of a model's layers out of it, but for those that stay."""
    layers = []
    for index, layer in enumerate(model.layers):
        tensors, parts, offset = [], [], 0
        for name in ("up", "down"):
            weight = getattr(layer, name).weight
            tensors.append(FetchedTensor(getattr(layer, name), "weight", f"layers.{index}.{name}.weight", offset))
            parts.append(weight.data.reshape(-1).view(torch.uint8).clone())
            offset += weight.nbytes
            if index not in stays:
                weight.data = absent(tensors[-1].full_name, weight.shape, weight.dtype, CPU)
        layers.append(FetchedLayer(index, layer, TensorSource(torch.cat(parts)), tuple(tensors), index in stays))
    return Fetcher(layers, CPU)


def gradients(model, forwards=1, between=()):
    """Return those of forwards and their backward, with some layers run `between` them without gradients."""
    rows = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    inputs = [(rows * (i + 1)).requires_grad_() for i in range(forwards)]
    model.zero_grad()
    loss = sum(model(batch).square().sum() for batch in inputs)
    with torch.no_grad():
        for index in between:
            model.layers[index](inputs[0])
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("forwards", "between", "stays"), [(1, (), ()), (2, (), ()), (1, (0, 4), ()), (1, (0, 4), (0, 3))]
)
@pytest.mark.parametrize("recomputes", [0, 1, 2], ids=["kept", "reentrant", "not reentrant"])
@pytest.mark.parametrize("calls_children", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_resident_weights(way, calls_children, recomputes, forwards, between, stays):
    """Two forwards before the backward are those of DPO."""
    models = Model(WAYS[way], calls_children), Model(WAYS[way], calls_children)
    fetched(models[1], stays)
    for model in models:
        for layer in model.layers:
            layer.gradient_checkpointing = recomputes
    for _ in range(2):
        expected, found = (gradients(model, forwards, between) for model in models)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("broken", "way"),
    [
        ("_pack", "views"),
        ("_before_backward", "parameters"),
        ("_before_layer", "parameters"),
        ("_keep_parameters", "a view in an attribute"),
    ],
)
def test_each_hook_is_needed(broken, way, monkeypatch):
    monkeypatch.setattr(Fetcher, broken, lambda self, *args: args[0] if broken == "_pack" else None)
    models = Model(WAYS[way]), Model(WAYS[way])
    fetched(models[1])
    # Without anything between them, the backward would find each layer in its slot of the forward, which it reverses.
    expected = gradients(models[0], between=(0, 4))
    try:
        found = gradients(models[1], between=(0, 4))
    except RuntimeError as error:
        assert "on this device only while its layer runs" in str(error)
    else:
        assert not all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_function_that_keeps_a_part_of_a_weight_is_rejected():
    model = Model(PartKernel.apply)
    fetched(model)
    with pytest.raises(
        RuntimeError, match=r"PartKernelBackward keeps a part of a weight of decoder layer 0.*=replicated"
    ):
        gradients(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_compiled_layers_are_those_of_resident_weights(backend):
    """What a compiler saves is its own choice."""
    models = Model(), Model()
    fetched(models[1])
    for layer in models[1].layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    expected, found = (gradients(model, between=(0, 4)) for model in models)
    torch._dynamo.reset()
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(expected, found, strict=True))


class OutOfMemory(Exception):
    pass


def test_an_error_inside_of_a_layer_leaves_the_next_step_right():
    models = Model(), Model()
    fetched(models[1])

    def fail(*args):
        raise OutOfMemory

    hook = models[1].layers[3].down.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory):
        gradients(models[1])
    hook.remove()
    expected, found = (gradients(model, between=(0, 4)) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_evaluation_and_an_early_stop_leave_the_next_step_right():
    models = Model(), Model()
    fetched(models[1])
    inputs = torch.ones(2, WIDTH)
    with torch.no_grad():
        assert torch.equal(models[1](inputs), models[0](inputs))
        models[1].layers[2](inputs)
    expected, found = (gradients(model) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_weight_that_is_away_keeps_its_shape_and_cannot_be_read():
    model = Model()
    fetched(model)
    with torch.no_grad():
        model(torch.ones(2, WIDTH))
    assert model.layers[0].up.weight.shape == (16, WIDTH)
    message = r"layers\.0\.up\.weight is on this device only while its layer runs.*FROZEN_WEIGHTS=replicated"
    for read in (lambda w: w + 1, lambda w: w.data_ptr(), torch.clone, lambda w: w.t(), copy.deepcopy):
        with pytest.raises(RuntimeError, match=message):
            read(model.layers[0].up.weight)


def test_weights_of_the_last_layers_only_are_in_memory():
    model = Model()
    fetcher = fetched(model)
    with torch.no_grad():
        model(torch.ones(2, WIDTH))
    sizes = [
        layer.up.weight.untyped_storage().nbytes() if i >= LAYERS - SLOTS else 0
        for i, layer in enumerate(model.layers)
    ]
    assert len({size for size in sizes if size}) == 1
    assert len(fetcher._shown) == SLOTS


def test_a_trained_weight_in_a_layer_is_rejected():
    model = Model()
    fetched(model)
    model.layers[1].down.weight.requires_grad_(True)
    with torch.no_grad():
        model(torch.ones(2, WIDTH))
    with pytest.raises(ValueError, match=r"layers\.1\.down\.weight is trained.*=replicated"):
        model(torch.ones(2, WIDTH))


def test_a_graph_without_a_backward_is_freed():
    """As after an error in the middle of a forward: what autograd has saved must not hold itself."""
    model = Model()
    fetched(model)
    gc.disable()
    try:
        memory = np.ones((2, WIDTH), dtype=np.float32)
        held = weakref.ref(memory)
        inputs = torch.from_numpy(memory).requires_grad_()
        model(inputs)
        del memory, inputs
        assert held() is None
    finally:
        gc.enable()


def test_all_weights_can_be_read_while_no_layer_runs():
    models = Model(), Model()
    fetcher = fetched(models[1])
    gradients(models[1])
    with fetcher.stopped():
        copied = copy.deepcopy(models[1])
    assert all(torch.equal(one, other) for one, other in zip(copied.parameters(), models[0].parameters(), strict=True))
    expected, found = (gradients(model) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
