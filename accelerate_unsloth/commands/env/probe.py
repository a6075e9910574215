"""
Import the libraries that may fail to load, and write down how it went: one JSON object a line.

Runs in a process of its own. A line is written before each import, so that a crash leaves the name of its cause.
"""

import json
import os
import sys
import warnings
from importlib import import_module

from . import choices


def torch() -> dict:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if usable else 0,
        "why_no_gpu": " ".join(str(warning.message) for warning in caught),
    }


def importing(name: str, *attributes: str):
    """A function that imports a library, and those of its names that its own file does not load."""

    def load() -> dict:
        module = import_module(name)
        for attribute in attributes:
            getattr(module, attribute)
        return {"version": module.__version__}

    load.__name__ = name
    return load


def xformers() -> dict:
    import xformers

    # It catches the failure of its own kernels to load; Unsloth then goes without it.
    from xformers._cpp_lib import _register_extensions

    _register_extensions()
    import xformers.ops.fmha

    return {"version": xformers.__version__}


def unsloth() -> dict:
    """Loads its kernels, and says what attention they would run through."""
    import unsloth

    from ...engines import kernels

    return {"version": unsloth.__version__, "kernels": kernels.describe("unsloth")}


def to_load(visible_gpus: int) -> list:
    """What a training imports, that of Unsloth first, which wants to be before the libraries it patches."""
    libraries = [
        importing("transformers", "AutoModelForCausalLM", "Trainer"),
        importing("accelerate", "Accelerator"),
        importing("peft", "get_peft_model"),
        importing("trl", "SFTTrainer"),
    ]
    if choices.engine_name(visible_gpus) == "unsloth":
        return [importing("bitsandbytes"), unsloth, *libraries]
    return libraries


def attempt(load, answer) -> dict:
    """One import, and how it went."""
    print(json.dumps({"begin": load.__name__}), file=answer)
    try:
        result = load()
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "cause": str(_first_of(error))}
        if isinstance(error, ModuleNotFoundError) and error.name == load.__name__:
            result = {"missing": True}
    print(json.dumps({"library": load.__name__, **result}), file=answer)
    return result


def _first_of(error: BaseException) -> BaseException:
    """What an error came from, behind those that were raised because of it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def main() -> None:
    # Libraries print while they are imported: let that go to standard error, and keep standard output to ourselves.
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    gpus = attempt(torch, answer).get("gpus", 0)
    for load in (importing("torchvision"), xformers, *to_load(gpus)):
        attempt(load, answer)


if __name__ == "__main__":
    sys.exit(main())
