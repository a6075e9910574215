"""
Read the sizes of a decoder-only model from its modules.

Configs name the sizes of experts in many ways, and not all of them say that a layer is a state-space layer. Modules
show both. Only a model whose layers are attention and gated MLPs, with or without experts, has a [`ModelShape`],
because no others were measured. A model that is not loaded is built on the meta device, in less than a second.
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .budget import ModelShape

Size = tuple[int, ...]

# The second is Aria's, whose config has no alias of the first (transformers 5.17).
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_topk")


class UnknownStructure(ValueError):
    """The model has no [`ModelShape`]; the message is a clause that says why."""


def shape_of(model: Any) -> ModelShape | None:
    """Return the sizes of a loaded model, with adapters or quantized; `None` if it has no [`ModelShape`]."""
    try:
        return read(model)
    except UnknownStructure:
        return None


def read_config(config: Any) -> ModelShape:
    """Read the sizes of the model that a config describes, without running code that comes with the model."""
    return read(on_meta_device(config))


def read(model: Any) -> ModelShape:
    """Read the sizes of a model, or of its language part; raise [`UnknownStructure`] for other kinds of layers."""
    shape, active = _sizes_of_config(model)
    decoder = _decoder_layers(model, shape.layers)
    layers = [_read_layer(number, layer, shape, active) for number, layer in enumerate(decoder)]
    shape = replace(shape, intermediate=max(layer.intermediate for layer in layers))
    values, width = sum(layer.values for layer in layers), sum(layer.width for layer in layers)
    return replace(shape, idle_values=values - shape.linear_values, idle_width=width - shape.adapter_width)


def on_meta_device(config: Any) -> Any:
    """Build the model that a config describes, without memory for its weights."""
    import torch
    import transformers

    auto_classes = {
        transformers.AutoModelForCausalLM: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.AutoModelForImageTextToText: transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    auto_class = next((known for known, configs in auto_classes.items() if type(config) in configs), None)
    if auto_class is None:
        raise UnknownStructure(
            "transformers has no language model for it, and code that comes with a model is not run"
        )
    copied = copy.deepcopy(config)  # building changes it
    try:
        with torch.device("meta"):
            return auto_class.from_config(copied, trust_remote_code=False, attn_implementation="eager")
    except Exception as error:  # constructors raise errors of any kind
        what = " ".join(str(error).split())[:200]
        raise UnknownStructure(f"transformers cannot build its model ({type(error).__name__}: {what})") from error


def _sizes_of_config(model: Any) -> tuple[ModelShape, int | None]:
    """Return the sizes that all configs name alike, and the number of experts per token."""
    try:
        text = model.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        shape = ModelShape(
            hidden=text.hidden_size,
            intermediate=0,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=text.vocab_size,
            tied=outputs is None or outputs.weight is inputs.weight,
        )
        active = [getattr(text, name, None) for name in _ACTIVE_EXPERTS]
    except Exception as error:  # configs of layers that differ (Gemma 4) raise custom errors
        raise UnknownStructure(f"its config does not give one size for all layers ({error})") from error
    return shape, next((number for number in active if isinstance(number, int)), None)


def parts_with_embedding(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and module of each part of a model that holds its input embedding; the first is the decoder of most."""
    embedding = model.get_input_embeddings()
    for path, part in model.named_modules():
        if any(child is embedding for child in part.children()):
            yield path, part


def stacks_of(decoder: Any, number: int) -> dict[str, Any]:
    """Return the lists of `number` layers in a decoder, by name."""
    from torch.nn import ModuleList

    children = decoder.named_children()
    return {name: part for name, part in children if isinstance(part, ModuleList) and len(part) == number}


def _decoder_layers(model: Any, number: int) -> list[Any]:
    """Return the layers of the decoder, if its only other weights are those of the input embedding."""
    embedding = model.get_input_embeddings()
    _, decoder = next(parts_with_embedding(model), (None, None))
    if decoder is None:
        raise UnknownStructure(f"no part of its {type(model).__name__} holds its embedding")
    named_stacks, others = stacks_of(decoder, number), []
    for name, part in decoder.named_children():
        if name not in named_stacks and part is not embedding and any(_sizes(leaf) for _, leaf in _leaves(part)):
            others.append(name)
    stacks = [*named_stacks.values()]
    if len(stacks) != 1 or others:
        what = f", but {', '.join(others)}" if others else ""
        raise UnknownStructure(f"its {type(decoder).__name__} is not an embedding and {number} layers{what}")
    return [*stacks[0]]


@dataclass
class _Layer:
    """Sums over the linear layers of one decoder layer."""

    values: int = 0
    width: int = 0  # inputs and outputs
    intermediate: int = 0  # what one token uses

    def add(self, sizes: list[Size], intermediate: int = 0, copies: int = 1) -> None:
        self.values += copies * sum(inputs * outputs for inputs, outputs in sizes)
        self.width += copies * sum(map(sum, sizes))
        self.intermediate += intermediate


def _read_layer(number: int, layer: Any, shape: ModelShape, active: int | None) -> _Layer:
    linears, stacks, others = _weights_of(layer)
    experts = min((size[0] for _, size in stacks), default=0)
    found, attentions = _Layer(), 0
    unknown = [path for path, size in others if min(size) > experts]  # else of a router, or experts' biases
    for path, block in linears.items():
        sizes = [*block.values()]
        width = _gated_width(sizes, shape.hidden)
        if sorted(sizes) in _attention(shape) and (not width or "att" in path):  # a fused MLP may have the same sizes
            attentions += 1
            found.add(sizes)
        elif width:
            found.add(sizes, width)
        elif any(outputs > experts for _, outputs in sizes):  # else a router, or the gate of a shared expert
            unknown += block
    if stacks:
        sizes = [size[1:] for _, size in stacks]
        width = _gated_width(sizes, shape.hidden)
        if width and active and all(size[0] == experts for _, size in stacks):
            found.add(sizes, active * width, copies=experts)
            if len(sizes) == 2:  # PEFT gives a gate and up in one stack the rank of both
                found.width += experts * (shape.hidden + 2 * width)
        else:
            unknown += [path for path, _ in stacks]
    if unknown or attentions != 1 or not found.intermediate:
        what = f", but has {', '.join(unknown[:4])}" if unknown else ""
        raise UnknownStructure(f"layer {number} is not attention by q, k, v and o with gated MLPs{what}")
    return found


def _weights_of(layer: Any) -> tuple[dict[str, dict[str, Size]], list[tuple[str, Size]], list[tuple[str, Size]]]:
    """
    Return linear layers by the block that holds them, stacks of them, and other weights; each with its path.

    A stack is one weight of three dimensions, or linear layers of one size in a `ModuleList`.
    """
    linears, listed, stacks, others = defaultdict(dict), Counter(), [], []
    for path, leaf in _leaves(layer):
        sizes = {f"{path}.{name}": size for name, size in _sizes(leaf).items()}
        if not hasattr(leaf, "in_features") or any(len(size) == 3 for size in sizes.values()):
            for name, size in sizes.items():
                (stacks if len(size) == 3 else others).append((name, size))
        elif (unnumbered := re.sub(r"\.\d+\b", "", path)) != path:
            listed[unnumbered, leaf.in_features, leaf.out_features] += 1
        else:
            linears[path.rpartition(".")[0]][path] = (leaf.in_features, leaf.out_features)
    stacks += [(path, (number, *size)) for (path, *size), number in listed.items()]
    return linears, stacks, others


def _leaves(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the modules that hold weights, without the adapters around them."""
    while hasattr(module, "base_layer"):  # PEFT
        module = module.base_layer
    if hasattr(module, "in_features"):
        yield path, module
        return
    if _sizes(module):
        yield path, module
    for name, part in module.named_children():
        yield from _leaves(part, f"{path}.{name}" if path else name)


def _sizes(module: Any) -> dict[str, Size]:
    """Return the sizes of a module's own weights, before quantization, without biases and norms."""
    sizes = {}
    for name, weight in module.named_parameters(recurse=False):
        packed = getattr(weight, "quant_state", None)
        size = tuple(weight.shape if packed is None else packed.shape)
        if len(size) > 1:
            sizes[name] = size
    return sizes


def _attention(shape: ModelShape) -> list[list[Size]]:
    """Return the sizes of the linear layers of attention: q, k, v and o, or the first three as one."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    separate = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [sorted(separate), sorted([(hidden, queries + 2 * keys), (queries, hidden)])]


def _gated_width(sizes: list[Size], hidden: int) -> int | None:
    """Return the width of a gated MLP (gate, up and down, or the first two as one); `None` for other layers."""
    width = sum(inputs * outputs for inputs, outputs in sizes) // (3 * hidden)
    separate, fused = [(hidden, width)] * 3, [(hidden, 2 * width), (hidden, width)]
    found = sorted(map(sorted, sizes))
    return width if found in (sorted(map(sorted, separate)), sorted(map(sorted, fused))) else None
