"""
The sizes of a model, from what a user calls it: "7B", a hub id, a folder, or a config.

A hub id or folder is read by transformers. Unsloth has to be imported before transformers, and a script asks for sizes
before it imports Unsloth; so where transformers is not imported yet, a process of its own reads them.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from .memory import ModelShape

# The dims that were published for the models that are named. Where several models go by one size, the one that takes
# the most memory: Qwen2.5-7B has a vocabulary several times that of Mistral-7B and Llama-2-7B.
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


@dataclass(frozen=True)
class NamedShape:
    """Sizes, and in words whose they are."""

    shape: ModelShape
    source: str


def resolve(model: Any, trust_remote_code: bool = False) -> NamedShape:
    """
    Find the sizes of a model; of one that also sees or hears, those of its language part.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedConfig`] or [`ModelShape`]):
            A size of `KNOWN` such as `"7B"`, a hub id, the folder of a model or of its config, or the config itself.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Let a hub id or folder bring its own config class.

    Returns:
        [`NamedShape`]

    Raises:
        ValueError: for a size that is not in the table, a config that cannot be read or has no such sizes.

    Example:

    ```python
    >>> from accelerate_unsloth import shapes
    >>> shapes.resolve("8b").source
    '8B, with the dims of Llama-3.1-8B'
    ```
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
            f"The size {model!r} is not in the table of published dims; choose one of {', '.join(KNOWN)}, or give a "
            "hub id, a folder or a config, whose sizes are then exact."
        )
    return NamedShape(read(name, trust_remote_code), f"the config of {name}")


def read(name: str, trust_remote_code: bool = False) -> ModelShape:
    """
    The sizes of a hub id or folder, without importing transformers into a process that has not done so.

    Raises:
        ValueError: if there is no config that can be read, or it is not that of a decoder-only language model.
    """
    if "transformers" in sys.modules:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"The config of {name!r} could not be read: {error}") from error
        return from_config(config)
    command = [sys.executable, "-m", __name__, name, *(["trust_remote_code"] if trust_remote_code else [])]
    finished = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        answer = json.loads(finished.stdout.splitlines()[-1])  # libraries may print before it
    except (IndexError, ValueError):
        raise ValueError(f"The config of {name!r} could not be read: {finished.stderr[-2000:]}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return ModelShape(**answer)


def from_config(config: Any) -> ModelShape:
    shape = ModelShape.from_config(config)
    if shape is None:
        raise ValueError(
            f"{type(config).__name__} does not give one size for all layers (hidden_size, intermediate_size, num_hidden_layers, "
            "num_attention_heads), so what it takes cannot be worked out from its config. Give a size of published dims near "
            f"it ({', '.join(KNOWN)}), or a ModelShape of your own."
        )
    return shape


def _main() -> None:
    import transformers  # noqa: F401  so that `read` stays in this process

    try:
        answer = asdict(read(sys.argv[1], "trust_remote_code" in sys.argv[2:]))
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
