"""
Whether the libraries that train can be imported, and whether torch can use the GPUs.

The imports run in another process (`python -m` this module), because one that crashes must not end the report. That process
writes a line of JSON with a library's name and `null` before its import, and another with the result after it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from .checks import NOTE, PROBLEM, Finding

# Names that a package loads lazily are imported one by one.
_OPTIONAL = {
    "torchvision": "import torchvision",
    # It hides that its kernels cannot be loaded, and Unsloth then does without it.
    "xformers": "from xformers._cpp_lib import _register_extensions as load; load(); import xformers.ops.fmha",
}
_OF_UNSLOTH = {"bitsandbytes": "import bitsandbytes", "unsloth": "import unsloth"}  # before what Unsloth patches
_REQUIRED = {
    "transformers": "from transformers import AutoModelForCausalLM, Trainer",
    "accelerate": "from accelerate import Accelerator",
    "peft": "from peft import get_peft_model",
    "trl": "from trl import SFTTrainer",
}


def import_libraries(timeout_s: int = 180) -> dict[str, dict]:
    """Import the libraries in another process and return a record per library: its `version`, an `error`, or `missing`."""
    path, failure = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]), ""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"PYTHONPATH": path, "UNSLOTH_COMPILE_LOCATION": cache}
        try:
            command = [sys.executable, "-m", __name__]
            subprocess.run(
                command, timeout=timeout_s, env=environment, stdout=output, stderr=subprocess.DEVNULL, check=True
            )
        except subprocess.TimeoutExpired:
            failure = f"did not finish within {timeout_s} s"
        except subprocess.CalledProcessError as error:
            status = error.returncode
            failure = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        output.seek(0)
        records = {name: record for line in output for name, record in json.loads(line).items()}
    if failure and None not in records.values():
        records["python"] = None
    return {name: {"error": failure} if record is None else record for name, record in records.items()}


def check_imports(records: dict[str, dict], gpus_of_driver: int) -> Iterator[Finding]:
    """Judge the imports, and whether torch can use the GPUs that the driver shows."""
    broken = None
    for name, record in records.items():
        subject, error = f"import {name}", " ".join(record.get("error", "").split())
        if record.get("missing"):
            if name in _OPTIONAL:  # the versions show the others
                yield Finding(subject, "not installed; optional")
        elif not error:
            yield Finding(subject, record["version"])
        elif name == "xformers":
            yield Finding(
                subject, error, NOTE, "Install the xformers of this torch, or none: PyTorch's attention is used."
            )
        else:
            fix = f"Run `python -c 'import {name}'` for details, and reinstall {name}."
            if name == "torchvision":
                fix = "Install torch and torchvision together, from one package index."
            yield Finding(subject, error, PROBLEM, f"Fix {broken} first, then run this again." if broken else fix)
            broken = broken or name
    torch = records.get("torch", {})
    if gpus_of_driver and torch.get("gpus") == 0:
        fix = f"Update NVIDIA's driver to one for CUDA {torch['cuda']}, or install a torch for this driver's CUDA."
        if torch["cuda"] is None:
            fix = "Install a CUDA build of torch and torchvision, or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        value = f"torch {torch['version']} can use none of {gpus_of_driver} GPU(s). {torch['warning']}"
        yield Finding("torch and GPUs", value, PROBLEM, fix)


def statements_for(visible_gpus: int) -> dict[str, str]:
    """Return the imports of a training run on so many GPUs."""
    from .choices import check_choices

    engine, _ = check_choices(visible_gpus)
    return _OPTIONAL | (_OF_UNSLOTH if engine == "unsloth" else {}) | _REQUIRED


def main() -> None:
    """Import the libraries one by one, and write a record of each."""
    # Libraries print when they are imported. That goes to standard error.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    gpus = _record("torch", "import torch", output).get("gpus", 0)
    for name, statement in statements_for(gpus).items():
        _record(name, statement, output)


def _record(name: str, statement: str, output) -> dict:
    print(json.dumps({name: None}), file=output)
    try:
        exec(statement, {})
        record = {"version": sys.modules[name].__version__, **_DETAILS.get(name, dict)()}
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
        record = {"missing": True} if is_missing else {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({name: record}), file=output)
    return record


def _torch_details() -> dict:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cuda": torch.version.cuda, "gpus": gpus, "warning": " ".join(str(warning.message) for warning in caught)}


def _unsloth_details() -> dict:
    from ...engines import kernels

    return {"kernels": kernels.describe("unsloth")}


_DETAILS = {"torch": _torch_details, "unsloth": _unsloth_details}

if __name__ == "__main__":
    main()
