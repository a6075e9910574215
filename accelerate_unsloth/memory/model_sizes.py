"""
Find the sizes of a model from a name ("7B"), a hub id, a folder or a config, without its weights or its own code.

A script asks for sizes before it imports Unsloth, which must be imported before transformers. Common dense models are
therefore read from their `config.json` alone; for others transformers is imported.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model_shape
from .budget import ModelShape

# Published sizes of the named models. If several models share a size, the one that needs the most memory is listed.
KNOWN = {
    "135M": ("SmolLM2-135M", ModelShape(576, 1536, 30, 9, 3, 64, 49152, tied=True)),
    "0.5B": ("Qwen2.5-0.5B", ModelShape(896, 4864, 24, 14, 2, 64, 151936, tied=True)),
    "1B": ("Llama-3.2-1B", ModelShape(2048, 8192, 16, 32, 8, 64, 128256, tied=True)),
    "1.5B": ("Qwen2.5-1.5B", ModelShape(1536, 8960, 28, 12, 2, 128, 151936, tied=True)),
    "3B": ("Llama-3.2-3B", ModelShape(3072, 8192, 28, 24, 8, 128, 128256, tied=True)),
    "7B": ("Qwen2.5-7B", ModelShape(3584, 18944, 28, 28, 4, 128, 152064)),
    "8B": ("Llama-3.1-8B", ModelShape(4096, 14336, 32, 32, 8, 128, 128256)),
    "13B": ("Llama-2-13B", ModelShape(5120, 13824, 40, 40, 40, 128, 32000)),
    "14B": ("Qwen2.5-14B", ModelShape(5120, 13824, 48, 40, 8, 128, 152064)),
    "32B": ("Qwen2.5-32B", ModelShape(5120, 27648, 64, 40, 8, 128, 152064)),
    "70B": ("Llama-3.1-70B", ModelShape(8192, 28672, 80, 64, 8, 128, 128256)),
    "72B": ("Qwen2.5-72B", ModelShape(8192, 29568, 80, 64, 8, 128, 152064)),
}

# Models whose layers are all alike, attention and one gated MLP, and the `head_dim` of a config without one.
_DENSE = {"llama": None, "mistral": None, "qwen2": None, "qwen3": 128}
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class NamedShape:
    """The sizes of a model, and a description of where they come from."""

    shape: ModelShape
    source: str


def resolve(model: Any, before_transformers: Callable[[], None] | None = None) -> NamedShape:
    """
    Find the sizes of a model, or of its language part; raise `ValueError` if they are not known.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedConfig`] or [`ModelShape`]):
            A size of `KNOWN` such as `"7B"`, a hub id, the folder of a model or of its config, or the config itself.
        before_transformers (`Callable`, *optional*): Called before transformers is imported, if it is needed.
    """
    if isinstance(model, ModelShape):
        return NamedShape(model, "the sizes that were given")
    if hasattr(model, "to_dict"):
        return NamedShape(from_config(model), f"the {type(model).__name__} that was given")
    name = str(model).strip()
    size = name.upper().replace(" ", "")
    if size in KNOWN:
        owner, shape = KNOWN[size]
        return NamedShape(shape, f"{size}, with the dims of {owner}")
    if re.fullmatch(r"[\d.]+[BM]?", size):
        raise ValueError(
            f"The size {model!r} is not in the table of published sizes. Choose one of {', '.join(KNOWN)}, or give a "
            "hub id, a folder or a config, whose sizes are exact."
        )
    config = _read_json(name)
    shape = _dense_shape(config)
    if shape is None:
        if before_transformers is not None:
            before_transformers()
        shape = from_config(_to_transformers(name, config))
    return NamedShape(shape, f"the config of {name}")


def from_config(config: Any) -> ModelShape:
    """Read the sizes of the model that a config describes; raise `ValueError` if its memory is unknown."""
    try:
        return model_shape.read_config(config)
    except model_shape.UnknownStructure as error:
        raise _unknown(type(config).__name__, str(error)) from error


def _read_json(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        file = Path(name) / "config.json" if Path(name).is_dir() else Path(hf_hub_download(name, "config.json"))
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The config of {name!r} could not be read: {error}") from error


def _dense_shape(config: dict[str, Any]) -> ModelShape | None:
    """Return the sizes of a model of `_DENSE`; `None` for others, and for a config that omits sizes."""
    kind = config.get("model_type")
    if kind not in _DENSE or not all(isinstance(config.get(name), int) for name in _SIZES):
        return None
    hidden, intermediate, layers, heads, kv_heads, vocabulary = (config[name] for name in _SIZES)
    head_dim = config.get("head_dim") or _DENSE[kind] or hidden // heads
    tied = config.get("tie_word_embeddings", False)
    return ModelShape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied)


def _to_transformers(name: str, config: dict[str, Any]):
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind].from_dict(config)
    if "auto_map" in config:
        raise _unknown(name, "its config is code that comes with the model, which is not run")
    raise _unknown(name, f"transformers has no model_type {kind!r}")


def _unknown(name: str, why: str) -> ValueError:
    return ValueError(
        f"The memory of {name} is unknown: {why}. Only attention with gated MLPs was measured, so nothing is planned. "
        f"Give a size of published dims near it ({', '.join(KNOWN)}), or a custom ModelShape. To train it, set "
        "micro_batch_tokens, which is tried before training."
    )
