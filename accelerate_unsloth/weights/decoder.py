"""The decoder layers of a model, and which of their weights can be shared."""

from dataclasses import dataclass

from torch import nn

from ..memory.model_shape import parts_with_embedding, stacks_of


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: its path in the model, and the paths of its parameters that no other module uses."""

    path: str
    parameters: tuple[str, ...]


def find_layers(model: nn.Module) -> list[DecoderLayer]:
    """
    Return the layers of a model's decoder, in order, without adapters; empty if they were not found.

    They are the list beside the input embedding with as many modules as the config says, so not those of a vision tower.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from accelerate_unsloth.weights.decoder import find_layers
    >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    >>> [layer.path for layer in find_layers(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **small)))]
    ['model.layers.0', 'model.layers.1']
    ```
    """
    try:
        number = model.config.get_text_config(decoder=True).num_hidden_layers
        parts = [*parts_with_embedding(model)]
    except (AttributeError, NotImplementedError, ValueError):  # not a language model, or one with other names
        return []
    tied = getattr(model, "all_tied_weights_keys", {})
    for path, part in parts:
        stacks = stacks_of(part, number)
        if len(stacks) == 1:
            ((name, stack),), shared = stacks.items(), {*tied, *tied.values()}
            stack_path = f"{path}.{name}" if path else name
            return [_layer(f"{stack_path}.{index}", layer, shared) for index, layer in enumerate(stack)]
    return []


def _layer(path: str, layer: nn.Module, shared: set[str]) -> DecoderLayer:
    names = [f"{path}.{name}" for name, _ in layer.named_parameters()]
    return DecoderLayer(path, tuple(name for name in names if name not in shared))
