"""
Checkpoints that are complete or invisible.

A checkpoint is written into a folder of its own that no reader looks into, gets a manifest of its files, and is then renamed
to its place in one step. A process that dies at any moment leaves the earlier ones as they were. Reading starts from the
newest whose files are those of its manifest. The manifest holds the size of each file, and the checksum of small ones only:
all ranks wait while it is made, and reading a full model again takes minutes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from . import stock_checkpoints

MANIFEST = "manifest.json"
FACTS = "accelerate_unsloth.json"
STAGING = ".incomplete"

_CHECKSUM_MAX_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**24

# Of a disk that takes no more: full, over a quota or a limit of file size, read-only, not permitted, or broken.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def publish(written: Path, place: Path, required: Collection[str] = ()) -> None:
    """
    Make a written checkpoint visible: manifest, flush to disk, rename.

    Args:
        written (`Path`): The folder that holds all its files, on the same file system as `place`.
        place (`Path`): Where it shall be; an older checkpoint there is replaced.
        required (`Collection[str]`, *optional*): Files without which it is not complete, relative to `written`.

    Raises:
        FileNotFoundError: if a required file is missing. Nothing is published then.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from accelerate_unsloth import checkpoints
    >>> run = Path(tempfile.mkdtemp())
    >>> (run / ".incomplete" / "checkpoint-1").mkdir(parents=True)
    >>> checkpoints.publish(run / ".incomplete" / "checkpoint-1", run / "checkpoint-1")
    >>> checkpoints.damage(run / "checkpoint-1") is None
    True
    ```
    """
    manifest = {str(file.relative_to(written)): _describe(file) for file in _files(written)}
    missing = sorted(set(required) - set(manifest))
    if missing:
        raise FileNotFoundError(
            f"{place.name} is not published: {', '.join(missing)} should be in {written} and is not. Earlier checkpoints are "
            "as they were. Look for what deletes files there, such as a second run with the same output folder."
        )
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in [*_files(written), written / MANIFEST]:
        _flush(file)
    if place.exists():  # a resumed run comes by the same step again
        replaced = written.with_name(f"{place.name}.replaced")
        place.rename(replaced)
        written.rename(place)
        _delete(replaced)
    else:
        written.rename(place)
    _flush(place.parent)


def may_replace(place: Path) -> bool:
    """Whether nothing is lost if a checkpoint takes this place: it is free, empty, or a checkpoint."""
    return not place.exists() or (place / MANIFEST).is_file() or (place.is_dir() and not any(place.iterdir()))


def write_facts(checkpoint: Path, facts: dict) -> None:
    """What a run has to have in common with the one that goes on from here, beside what the Trainer writes down."""
    (checkpoint / FACTS).write_text(json.dumps(facts))


def read_facts(checkpoint: Path) -> dict:
    """Nothing if they were not written by this library."""
    file = checkpoint / FACTS
    return json.loads(file.read_text()) if file.is_file() else {}


def run_of(checkpoint: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint, or `None` if that was not one of this library."""
    with suppress(OSError, ValueError):
        return read_facts(checkpoint).get("run")
    return None


def has_disk_refused(error: Exception) -> bool:
    """
    Return whether an error while saving means that the disk takes no more, rather than that some code is wrong.

    safetensors and PyTorch give no error number (safetensors 0.8, torch 2.14): the one has it in its text, the other names
    its writer or its stream.
    """
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        return number is not None and int(number[1]) in _DISK_ERRORS
    # Not its subclasses: what another rank reports of its disk is that rank's to say.
    return type(error) is RuntimeError and any(
        part in str(error) for part in ("inline_container.cc", "iostream error")
    )


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint that has a manifest, or return `None` if it is as it was written."""
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
            return f"the checksum of {name} is another"
    return None


def newest_complete(run_folder: Path) -> tuple[Path | None, list[str]]:
    """
    Find the newest complete checkpoint of a folder. One that the stock Trainer wrote is judged by what that writes.

    Args:
        run_folder (`Path`): The trainer's `output_dir`.

    Returns:
        `tuple[Path | None, list[str]]`: the checkpoint, and a line for each newer one that was passed over.
    """
    passed_over = []
    for checkpoint in sorted(_checkpoints(run_folder), key=_step, reverse=True):
        is_ours = any((checkpoint / name).is_file() for name in (MANIFEST, FACTS))
        wrong = damage(checkpoint) if is_ours else stock_checkpoints.damage(checkpoint)
        if wrong is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {wrong}")
    return None, passed_over


def rotate(run_folder: Path, limit: int | None, keep: set[Path], run: str) -> None:
    """
    Delete the checkpoints of a run that were published first, beyond `limit`. Those of other runs do not count.

    Args:
        run_folder (`Path`): The trainer's `output_dir`.
        limit (`int`, *optional*): The trainer's `save_total_limit`.
        keep (`set[Path]`): Checkpoints that stay: the one just published, which is complete, and the best.
        run (`str`): Its id, as in the facts of its checkpoints.
    """
    for left in run_folder.glob(".deleted-checkpoint-*"):  # of a process that died while it deleted
        _delete(left)
    if not limit or limit <= 0:
        return
    kept = {path.resolve() for path in keep}
    own = [checkpoint for checkpoint in _checkpoints(run_folder) if run_of(checkpoint) == run]
    oldest_first = sorted(own, key=_published_at)
    candidates = [checkpoint for checkpoint in oldest_first if checkpoint.resolve() not in kept]
    for checkpoint in candidates[: max(0, len(oldest_first) - limit)]:
        # Out of sight first: a process that dies while deleting leaves no half of a checkpoint.
        doomed = run_folder / f".deleted-{checkpoint.name}"
        checkpoint.rename(doomed)
        _delete(doomed)


def _delete(checkpoint: Path) -> None:
    """The link alone where it is one: what it points to lies outside of this folder, and is not ours."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def _published_at(checkpoint: Path) -> tuple[float, int]:
    """When it was published; a folder may hold higher steps of an earlier run."""
    manifest = checkpoint / MANIFEST
    return (manifest if manifest.exists() else checkpoint).stat().st_mtime, _step(checkpoint)


def _checkpoints(run_folder: Path) -> list[Path]:
    """Named as the Trainer names them."""
    return [
        path
        for path in run_folder.glob("checkpoint-*")
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)


def _describe(file: Path) -> dict:
    size = file.stat().st_size
    return {"bytes": size} | ({"sha256": _checksum(file)} if size < _CHECKSUM_MAX_BYTES else {})


def _checksum(file: Path) -> str:
    checksum = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
