"""Whether the libraries that train can be imported here, and whether torch reaches the GPUs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from .finding import NOTE, OK, PROBLEM, Finding

# What is not there: how bad that is, and what it is for.
_USES = {
    "torch": (PROBLEM, "nothing trains without it"),
    "torchvision": (OK, "models with images need it"),
    "xformers": (OK, "optional, PyTorch's attention is used"),
    "bitsandbytes": (NOTE, "4-bit weights and 8-bit optimizers need it"),
}

_PACKAGE_PARENT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Loaded:
    """What the probe wrote: a record a library, and where and why it ended, if it did not finish."""

    records: dict[str, dict] = field(hash=False)
    crashed_in: str | None = None
    crash: str = ""

    def visible_gpus(self, seen_by_driver: int) -> int:
        """GPUs that torch can use; those of the driver, if torch could not be asked."""
        return self.records.get("torch", {}).get("gpus", seen_by_driver)


def load(timeout_s: int = 180) -> Loaded:
    """Import them in a process of their own."""
    path = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "accelerate_unsloth.commands.env.probe"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        # What Unsloth writes when it is imported shall neither stay here, nor be taken from here.
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"PYTHONPATH": path, "UNSLOTH_COMPILE_LOCATION": cache}
            done = subprocess.run(command, timeout=timeout_s, env=environment, **streams)
    except subprocess.TimeoutExpired as error:
        return read((error.stdout or b"").decode(), f"had not ended after {timeout_s} s")
    return read(done.stdout.decode(), _how_it_ended(done.returncode))


def read(output: str, how_it_ended: str) -> Loaded:
    """
    Make sense of what the probe wrote before it ended.

    Args:
        output (`str`): Its lines.
        how_it_ended (`str`): Empty if in order.
    """
    lines = [json.loads(line) for line in output.splitlines()]
    records = {line.pop("library"): line for line in lines if "library" in line}
    begun = [line["begin"] for line in lines if "begin" in line]
    unfinished = [name for name in begun if name not in records]
    if how_it_ended:
        return Loaded(records, unfinished[0] if unfinished else "python", how_it_ended)
    return Loaded(records)


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"ended with status {status}" if status else ""


def findings(loaded: Loaded, seen_by_driver: int) -> list[Finding]:
    """
    Verdicts on what was loaded.

    Args:
        loaded (`Loaded`): What the probe found.
        seen_by_driver (`int`): Visible GPUs, as the driver counts them.
    """
    torch = loaded.records.get("torch", {})
    found, failed = [], {}
    for name, record in loaded.records.items():
        if not record.get("missing") or name in _USES:  # a missing requirement is among the versions
            finding = judge(name, record, torch.get("version"))
            found.append(_blame_the_first(finding, failed.get(record.get("cause"))))
        if "cause" in record:
            failed.setdefault(record["cause"], name)
    if loaded.crashed_in:
        remedy = f"Run `python -c 'import {loaded.crashed_in}'` to see why, and reinstall or remove it."
        found.append(Finding(f"import {loaded.crashed_in}", loaded.crash, PROBLEM, remedy))
    if "gpus" in torch:
        found.append(_reach(torch, seen_by_driver))
    return found


def judge(name: str, record: dict, torch_version: str | None) -> Finding:
    """The verdict on one import."""
    subject, error = f"import {name}", " ".join(record.get("error", "").split())
    if record.get("missing"):
        return _judge_missing(name, subject)
    if not error:
        return Finding(subject, record["version"])
    if name == "torchvision":
        kind = _build(torch_version)
        remedy = (
            f"This torchvision was not built for torch {torch_version}: install both from one index, such as "
            f"`pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/{kind}`."
        )
        return Finding(subject, error, PROBLEM, remedy)
    if name == "xformers":
        remedy = "Unsloth goes on with PyTorch's attention. Install an xformers built for this torch, or remove it."
        return Finding(subject, error, NOTE, remedy)
    return Finding(subject, error, PROBLEM, f"Reinstall {name}.")


def _judge_missing(name: str, subject: str) -> Finding:
    verdict, use = _USES[name]
    return Finding(subject, f"not installed; {use}", verdict, "" if verdict == OK else f"pip install {name}")


def _blame_the_first(finding: Finding, first: str | None) -> Finding:
    """What cannot be imported because of another is no fault of its own."""
    return finding if first is None else replace(finding, remedy=f"Mend {first} first, which fails the same way.")


def _build(torch_version: str | None) -> str:
    """The name of PyTorch's index for a build: `"cpu"` for `2.14.1+cpu`, `"cu130"` where the version does not tell."""
    return torch_version.partition("+")[2] or "cu130" if torch_version else "cu130"


def _reach(torch: dict, seen_by_driver: int) -> Finding:
    """Whether torch can use the GPUs that the driver shows."""
    subject, gpus = "torch and GPUs", torch["gpus"]
    if gpus or not seen_by_driver:
        return Finding(subject, f"torch {torch['version']} can use {gpus} GPU(s)", OK)
    if torch["cuda"] is None:
        remedy = "Install a CUDA build of torch and torchvision, or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        return Finding(subject, f"{seen_by_driver} GPU(s), but torch {torch['version']} has no CUDA", PROBLEM, remedy)
    why = torch["why_no_gpu"] or "it gives no reason"
    remedy = (
        f"Update NVIDIA's driver to one for CUDA {torch['cuda']}, or install a torch built for this driver's CUDA."
    )
    return Finding(subject, f"{seen_by_driver} GPU(s), but torch can use none: {why}", PROBLEM, remedy)
