"""
Checkpoints that are complete or invisible.

All ranks write a checkpoint into a staging folder, which no reader looks into. Rank 0 adds a manifest of its files and renames
it in one step, so a process that dies at any moment leaves the earlier checkpoints as they were. The manifest holds the size of
each file, and the checksum of small ones only: all ranks wait for it, and reading a full model again takes minutes.
"""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from ..launch.channel import channel
from ..launch.topology import topology
from . import stock_checkpoints

MANIFEST = "manifest.json"
FACTS = "accelerate_unsloth.json"
STAGING = ".incomplete"

_CHECKSUM_MAX_BYTES = 64 * 2**20

# Errors of a disk that is full, over a quota or a limit of file size, read-only, not permitted, or broken.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def prepare_staging(folder: Path) -> bool:
    """
    Make an empty `folder` on every machine; return whether this rank writes to the disk of rank 0, which alone is published.

    All ranks wait until every machine has cleared: files written before would be lost. Cost: three messages per checkpoint.
    """
    channel().run_on_local_main("clear", functools.partial(shutil.rmtree, folder, ignore_errors=True))
    channel().gather("cleared", True)  # another machine may share the disk and still be clearing
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex  # a new name, which no client of a network disk has cached as missing
    if topology().is_main:
        (folder / token).touch()
    token = channel().gather("staging", token)[0]
    return (folder / token).exists()


def gather_required(names: list[str], shares_disk: bool) -> list[str]:
    """Wait until all ranks have written their files `names`; return those of the ranks that share the disk of rank 0."""
    written = channel().gather("written", names if shares_disk else [])
    return sorted({name for rank in written for name in rank})


def publish(written: Path, place: Path, required: Collection[str] = ()) -> None:
    """
    Make a written checkpoint visible: manifest, flush to disk, rename.

    Args:
        written (`Path`): Folder that holds all its files, on the same file system as `place`.
        place (`Path`): Final folder; an older checkpoint there is replaced.
        required (`Collection[str]`, *optional*): Files without which it is not complete, relative to `written`.

    Raises:
        FileNotFoundError: if a required file is missing. Nothing is published then.
    """
    files = sorted(file for file in written.rglob("*") if file.is_file() and file.name != MANIFEST)
    manifest = {str(file.relative_to(written)): _describe(file) for file in files}
    missing = sorted(set(required) - set(manifest))
    if missing:
        raise FileNotFoundError(
            f"{place.name} is not published: {', '.join(missing)} should be in {written} and is not. Earlier checkpoints are "
            "unchanged. Look for what deletes files there, such as a second run with the same output folder."
        )
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in [*files, written / MANIFEST]:
        _flush(file)
    if place.exists():  # a resumed run reaches the same step again
        replaced = written.with_name(f"{place.name}.replaced")
        place.rename(replaced)
        written.rename(place)
        _delete(replaced)
    else:
        written.rename(place)
    _flush(place.parent)


def may_replace(place: Path) -> bool:
    """Return whether nothing is lost if a checkpoint takes this place: it is free, empty, or a checkpoint."""
    return not place.exists() or (place / MANIFEST).is_file() or (place.is_dir() and not any(place.iterdir()))


def write_facts(checkpoint: Path, facts: dict) -> None:
    """Write what the Trainer does not save, and a run that continues from here has to match."""
    (checkpoint / FACTS).write_text(json.dumps(facts))


def read_facts(checkpoint: Path) -> dict:
    """Return what [`write_facts`] wrote; an empty dictionary for checkpoints of others."""
    file = checkpoint / FACTS
    return json.loads(file.read_text()) if file.is_file() else {}


def run_of(checkpoint: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint, or `None` if it is not known."""
    with suppress(OSError, ValueError):
        return read_facts(checkpoint).get("run")
    return None


def has_disk_refused(error: Exception) -> bool:
    """
    Return whether an error while saving comes from the disk, rather than from a mistake in code.

    safetensors has the error number in its text only, and PyTorch names its writer or its stream instead (safetensors 0.8,
    torch 2.14).
    """
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        return number is not None and int(number[1]) in _DISK_ERRORS
    # Not its subclasses: an error that another rank reports is explained by that rank.
    return type(error) is RuntimeError and any(
        part in str(error) for part in ("inline_container.cc", "iostream error")
    )


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, as a text, or `None` if its files are those of its manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it is not complete, or not written by accelerate_unsloth"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if "sha256" in expected and _checksum(file) != expected["sha256"]:
            return f"{name} has another checksum than when it was saved"
    return None


def newest_complete(run_folder: Path) -> tuple[Path | None, list[str]]:
    """
    Return the newest complete checkpoint of an `output_dir`, whether this library or the stock Trainer wrote it, and a line for
    each newer one that was skipped.
    """
    skipped = []
    for checkpoint in sorted(_checkpoints(run_folder), key=_step, reverse=True):
        is_ours = any((checkpoint / name).is_file() for name in (MANIFEST, FACTS))
        wrong = damage(checkpoint) if is_ours else stock_checkpoints.damage(checkpoint)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint} is skipped: {wrong}")
    return None, skipped


def rotate(run_folder: Path, limit: int | None, keep: set[Path], run: str) -> None:
    """
    Delete the checkpoints of a run that were published first, beyond `limit` (the trainer's `save_total_limit`), but not those
    in `keep`. Checkpoints of other runs, which have another id `run` in their facts, do not count.
    """
    for left in run_folder.glob(".deleted-checkpoint-*"):  # by a process that died while deleting
        _delete(left)
    if not limit or limit <= 0:
        return
    kept = {path.resolve() for path in keep}
    own = [checkpoint for checkpoint in _checkpoints(run_folder) if run_of(checkpoint) == run]
    candidates = [checkpoint for checkpoint in sorted(own, key=_published_at) if checkpoint.resolve() not in kept]
    for checkpoint in candidates[: max(0, len(own) - limit)]:
        # Renamed first: a process that dies while deleting leaves no half of a checkpoint.
        deleted = run_folder / f".deleted-{checkpoint.name}"
        checkpoint.rename(deleted)
        _delete(deleted)


def _delete(checkpoint: Path) -> None:
    if checkpoint.is_symlink():  # its target lies outside of this folder, and stays
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def _published_at(checkpoint: Path) -> tuple[float, int]:
    """Return a sort key: the time, because a folder may hold higher steps of an earlier run."""
    manifest = checkpoint / MANIFEST
    return (manifest if manifest.exists() else checkpoint).stat().st_mtime, _step(checkpoint)


def _checkpoints(run_folder: Path) -> list[Path]:
    named = run_folder.glob("checkpoint-*")
    return [path for path in named if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _describe(file: Path) -> dict:
    size = file.stat().st_size
    return {"bytes": size} | ({"sha256": _checksum(file)} if size < _CHECKSUM_MAX_BYTES else {})


def _checksum(file: Path) -> str:
    checksum = hashlib.sha256()
    with file.open("rb") as content:  # manifests of earlier versions hold checksums of large files
        for chunk in iter(functools.partial(content.read, 2**24), b""):
            checksum.update(chunk)
    return checksum.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
