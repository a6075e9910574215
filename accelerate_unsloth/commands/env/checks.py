"""Checks that import nothing heavy: versions, GPUs, variables and disk space."""

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path

from ...devices.manager import Device
from ...plugin import PREFIX, UnslothPlugin

OK, NOTE, PROBLEM = "ok", "note", "problem"

_DISTRIBUTION = "accelerate-unsloth"
_ONLY_FOR_UNSLOTH = ("unsloth", "unsloth_zoo", "unsloth-zoo")
_OLDEST_FOR_UNSLOTH = (7, 0)  # compute capability
_IDLE_SHARE_FREE = 0.9  # an idle GPU has at least this share of its memory free
_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report: a problem if training cannot work, a note if it may matter."""

    subject: str
    value: str
    verdict: str = OK
    fix: str = ""  # what to do about it


def check_versions(engine: str | None) -> Iterator[Finding]:
    """Compare Python and all required packages with the tested ranges, which are those of this package's metadata."""
    yield Finding("python", platform.python_version())
    try:
        yield Finding(_DISTRIBUTION, metadata.version(_DISTRIBUTION))
        yield from compare_versions(metadata.requires(_DISTRIBUTION) or [], installed_version, engine)
    except metadata.PackageNotFoundError:
        yield Finding(_DISTRIBUTION, "not installed", NOTE, "Install it with pip so that versions can be checked.")


def compare_versions(
    required: Iterable[str], installed: Callable[[str], str | None], engine: str | None
) -> Iterator[Finding]:
    """
    Compare the versions that `installed` returns with requirements such as `"torch<2.15,>=2.11"`, without those of extras.

    Only the engine `"unsloth"` needs Unsloth.
    """
    from packaging.requirements import Requirement

    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, tested, version = requirement.name, requirement.specifier, installed(requirement.name)
        install = f'pip install "{name}{tested}"'
        if version is None:
            is_needed = engine == "unsloth" or name not in _ONLY_FOR_UNSLOTH
            yield Finding(name, "not installed", PROBLEM if is_needed else NOTE, install)
        elif tested.contains(version, prereleases=True):
            yield Finding(name, version)
        else:
            yield Finding(name, f"{version}, tested with {tested}", NOTE, install)


def installed_version(name: str) -> str | None:
    """Return the version of a package, or `None` if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_gpus(devices: Sequence[Device], notes: Sequence[str], driver: str | None) -> Iterator[Finding]:
    """Describe the driver and the visible GPUs, with what the [`DeviceManager`] notes about them."""
    if driver:
        yield Finding("driver", driver)
    for note in notes:
        yield Finding("GPUs", note, NOTE)
    for device in devices:
        memory = f"{device.free_gib:.1f} of {device.total_gib:.1f} GiB free"
        value = f"{device.name}, {memory}, compute capability {'.'.join(map(str, device.compute_capability))}"
        fix = ""
        if device.compute_capability < _OLDEST_FOR_UNSLOTH:
            fix = "Unsloth needs 7.0 or newer; leave this GPU out of CUDA_VISIBLE_DEVICES."
        elif device.free_gib < _IDLE_SHARE_FREE * device.total_gib:
            fix = "Other processes use its memory: see `nvidia-smi`, or select other GPUs with CUDA_VISIBLE_DEVICES."
        elif not device.bf16:
            fix = "It has no bfloat16: train with fp16=True, bf16=False."
        yield Finding(f"GPU {device.index}", value, NOTE if fix else OK, fix)


def list_variables() -> Iterator[Finding]:
    """List variables that affect training: known names only, so that no secret is shown."""
    names = [*_VARIABLES, *(PREFIX + field.name.upper() for field in fields(UnslothPlugin))]
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    if found:
        yield Finding("environment", ", ".join(found))


def check_space() -> Iterator[Finding]:
    """Check the space for output, for models from the hub, and for data that processes share in memory."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield judge_space("disk here", Path.cwd(), 10, 0.5, "Free some space, or train in another folder.")
    fix = "Free some space, or set HF_HOME or HF_HUB_CACHE to a folder on a larger disk."
    yield judge_space("Hugging Face cache", Path(HF_HUB_CACHE), 20, 0.5, fix)
    if (shared := Path("/dev/shm")).is_dir():
        fix = "Processes share data there; start the container with --shm-size=8g or --ipc=host."
        yield judge_space("shared memory", shared, 1, 0.03, fix)


def judge_space(subject: str, folder: Path, scarce_gib: float, least_gib: float, fix: str) -> Finding:
    """Return a note if less than `scarce_gib` are free, a problem below `least_gib`."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free_gib = shutil.disk_usage(existing).free / 2**30
    value = f"{free_gib:.1f} GiB free in {folder}"
    if free_gib >= scarce_gib:
        return Finding(subject, value)
    return Finding(subject, value, PROBLEM if free_gib < least_gib else NOTE, fix)
