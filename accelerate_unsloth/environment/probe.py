"""
Import the libraries that may fail to load, and write down how it went: one JSON object a line.

Runs in a process of its own. A line is written before each import, so that a crash leaves the name of its cause.
"""

import json
import os
import sys
import warnings


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


def main() -> None:
    # Libraries print while they are imported: let that go to standard error, and keep standard output to ourselves.
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for load in (torch, torchvision, xformers):
        print(json.dumps({"begin": load.__name__}), file=answer)
        try:
            result = load()
        except ModuleNotFoundError as error:
            missing = error.name == load.__name__
            result = {"missing": True} if missing else {"error": f"{type(error).__name__}: {error}"}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"library": load.__name__, **result}), file=answer)


if __name__ == "__main__":
    sys.exit(main())
