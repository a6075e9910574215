"""Checkpoints of the stock Trainer: which files hold the model, and whether they can be read."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

_STATE = "trainer_state.json"

_ADAPTERS = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)


def weights(checkpoint: Path) -> list[str]:
    """
    List the files that hold the model or its adapters, relative to the checkpoint.

    Raises:
        OSError, ValueError: if an index of shards cannot be read.
    """
    names = [name for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, *_ADAPTERS) if (checkpoint / name).is_file()]
    # PEFT writes an adapter that is not called "default" into a folder of its name.
    names += [f"{file.parent.name}/{name}" for name in _ADAPTERS for file in sorted(checkpoint.glob(f"*/{name}"))]
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (checkpoint / index).is_file():
            try:
                shards = set(json.loads((checkpoint / index).read_text())["weight_map"].values())
            except (KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} names no shards") from error
            names += [index, *sorted(shards)]
    return names


def damage(checkpoint: Path) -> str | None:
    """
    Return what is wrong with a checkpoint that has no manifest, as a text, or `None` if the Trainer can resume from it.

    The Trainer writes its state last. So a checkpoint with a state is finished, unless a file was damaged afterwards.
    """
    try:
        json.loads((checkpoint / _STATE).read_text())
        names = weights(checkpoint)
    except FileNotFoundError:
        return f"it has no {_STATE}, so it was not finished"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    if not names:
        return "it holds no model and no adapter"
    return next((wrong for wrong in map(_damage_of_file, (checkpoint / name for name in names)) if wrong), None)


def _damage_of_file(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if not file.stat().st_size:
        return f"{file.name} is empty"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and compares the size with it
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} cannot be read ({error})"
    return None
