"""
Import the libraries that may fail to load, and write down how it went: one JSON object a line.

Runs in a process of its own. A line is written before each import, so that a crash leaves the name of its cause.
"""

import json
import os
import sys
import warnings

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


def torchvision() -> dict:
    import torchvision

    return {"version": torchvision.__version__}


def xformers() -> dict:
    import xformers

    # It catches the failure of its own kernels to load; Unsloth then goes without it.
    from xformers._cpp_lib import _register_extensions

    _register_extensions()
    import xformers.ops.fmha

    return {"version": xformers.__version__}


def transformers() -> dict:
    import transformers
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401  # the package itself loads nothing

    return {"version": transformers.__version__}


def accelerate() -> dict:
    import accelerate
    from accelerate import Accelerator  # noqa: F401

    return {"version": accelerate.__version__}


def peft() -> dict:
    import peft
    from peft import get_peft_model  # noqa: F401

    return {"version": peft.__version__}


def trl() -> dict:
    import trl
    from trl import SFTTrainer  # noqa: F401  # the package itself loads nothing

    return {"version": trl.__version__}


def bitsandbytes() -> dict:
    import bitsandbytes

    return {"version": bitsandbytes.__version__}


def unsloth() -> dict:
    """Loads its kernels, and says what attention they would run through."""
    import unsloth

    from ..engines import kernels

    runs_segments, other = kernels.sdpa_runs_segments("unsloth")
    facts = {
        "runs_segments": runs_segments,
        "other": other,
        "prefers_cudnn": kernels.prefers_cudnn(),
        "has_varlen": runs_segments and kernels.spare_varlen() is not None,
    }
    return {"version": unsloth.__version__, "kernels": facts}


def to_load(visible_gpus: int) -> list:
    """What a training imports, that of Unsloth first, which wants to be before the libraries it patches."""
    libraries = [transformers, accelerate, peft, trl]
    if choices.engine_name(visible_gpus) == "unsloth":
        return [bitsandbytes, unsloth, *libraries]
    return libraries


def attempt(load, answer) -> dict:
    """One import, and how it went."""
    print(json.dumps({"begin": load.__name__}), file=answer)
    try:
        result = load()
    except ModuleNotFoundError as error:
        missing = error.name == load.__name__
        failed = {"error": f"{type(error).__name__}: {error}", "cause": str(_first_of(error))}
        result = {"missing": True} if missing else failed
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "cause": str(_first_of(error))}
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
    for load in (torchvision, xformers, *to_load(gpus)):
        attempt(load, answer)


if __name__ == "__main__":
    sys.exit(main())
