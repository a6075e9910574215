"""Free space: for checkpoints, for models from the hub, and for what processes share in memory."""

import shutil
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from .finding import NOTE, OK, PROBLEM, Finding

_GIB = 2**30


def findings(here: Path) -> list[Finding]:
    """
    A line each for the disk under `here`, the disk of the Hugging Face cache, and `/dev/shm`.

    Args:
        here (`Path`): Where output would be written.
    """
    cache = Path(HF_HUB_CACHE)
    found = [
        judge("disk here", here, _free_gib(here), scarce_gib=10, least_gib=0.5, remedy="Free some, or train elsewhere."),
        judge(
            "disk of the Hugging Face cache", cache, _free_gib(cache), scarce_gib=20, least_gib=0.5,
            remedy="Free some, or set HF_HOME, or HF_HUB_CACHE alone, to a folder on a larger disk.",
        ),
    ]  # fmt: skip
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = "Processes share data there; give a container more with --shm-size=8g or --ipc=host."
        found.append(judge("shared memory", shared, _free_gib(shared), scarce_gib=1, least_gib=0.03, remedy=remedy))
    return found


def judge(subject: str, place: Path, free_gib: float, scarce_gib: float, least_gib: float, remedy: str) -> Finding:
    """A verdict on free space: a note below `scarce_gib`, a problem below `least_gib`."""
    value = f"{free_gib:.1f} GiB free in {place}"
    if free_gib < least_gib:
        return Finding(subject, value, PROBLEM, remedy)
    return Finding(subject, value, NOTE, remedy) if free_gib < scarce_gib else Finding(subject, value, OK)


def _free_gib(place: Path) -> float:
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free / _GIB
