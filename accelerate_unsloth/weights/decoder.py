"""The decoder layers of a model, and which of their weights can be shared."""

from dataclasses import dataclass

from torch import nn


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
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError, ValueError):  # not a language model, or one with other names
        return []
    tied = getattr(model, "all_tied_weights_keys", {})
    for path, part in model.named_modules():
        if not any(child is embedding for child in part.children()):
            continue
        stacks = [
            (f"{path}.{name}" if path else name, child)
            for name, child in part.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == number
        ]
        if len(stacks) == 1:
            (stack_path, stack), shared = stacks[0], {*tied, *tied.values()}
            return [_layer(f"{stack_path}.{index}", layer, shared) for index, layer in enumerate(stack)]
    return []


def _layer(path: str, layer: nn.Module, shared: set[str]) -> DecoderLayer:
    names = [f"{path}.{name}" for name, _ in layer.named_parameters()]
    return DecoderLayer(path, tuple(name for name in names if name not in shared))
