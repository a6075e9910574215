"""
The sizes of a model, from what a user calls it: "7B", a hub id, a folder, or a config.

A hub id or folder is read by transformers, without weights and without code that comes with a model. Unsloth has to be
imported before transformers, and a script asks for sizes before it imports Unsloth. Where transformers is not imported
yet, another process reads them.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from . import model_shape
from .budget import ModelShape

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


def resolve(model: Any) -> NamedShape:
    """
    Find the sizes of a model; of one that also sees or hears, those of its language part.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedConfig`] or [`ModelShape`]):
            A size of `KNOWN` such as `"7B"`, a hub id, the folder of a model or of its config, or the config itself.

    Returns:
        [`NamedShape`]

    Raises:
        ValueError: for a size that is not in the table, a config that cannot be read, or a model whose memory is unknown.

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
    return NamedShape(read(name), f"the config of {name}")


def read(name: str) -> ModelShape:
    """
    Read the sizes of a hub id or folder, without importing transformers into a process that has not done so.

    Raises:
        ValueError: if there is no config that can be read, or the memory of its model is unknown.
    """
    if "transformers" in sys.modules:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise _unknown(name, "its config is code that comes with the model, which is not run") from None
            raise ValueError(f"The config of {name!r} could not be read: {error}") from error
        return from_config(config)
    finished = subprocess.run(
        [sys.executable, "-m", __name__, name], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    try:
        answer = json.loads(finished.stdout.splitlines()[-1])  # libraries may print before it
    except (IndexError, ValueError):
        raise ValueError(f"The config of {name!r} could not be read: {finished.stderr[-2000:]}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return ModelShape(**answer)


def from_config(config: Any) -> ModelShape:
    """
    Read the sizes of the model that a config describes, without loading or changing anything.

    Raises:
        ValueError: if the memory of the model is unknown.
    """
    try:
        return model_shape.read_config(config)
    except model_shape.UnknownStructure as error:
        raise _unknown(type(config).__name__, str(error)) from error


def _unknown(name: str, why: str) -> ValueError:
    return ValueError(
        f"The memory of {name} is unknown: {why}. What a token takes was measured for attention with gated MLPs only, so "
        f"nothing is planned. Give a size of published dims near it ({', '.join(KNOWN)}), or a custom ModelShape. To train "
        "it, set micro_batch_tokens, which is tried before training."
    )


def _main() -> None:
    import transformers  # noqa: F401  so that `read` stays in this process

    try:
        answer = asdict(read(sys.argv[1]))
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
