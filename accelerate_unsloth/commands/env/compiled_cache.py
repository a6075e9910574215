"""
Whether `unsloth_compiled_cache` was made by the versions that are installed.

Unsloth writes Python files there and stamps each one: a string of the versions of unsloth_zoo, unsloth, transformers
and trl, a line each, before the word `__UNSLOTH_VERSIONING__` (unsloth_zoo 2026.10.7, `compiler.py`).
"""

import os
from collections.abc import Callable
from pathlib import Path

from .finding import NOTE, OK, Finding
from .versions import installed_version

_STAMPED = ("unsloth_zoo", "unsloth", "transformers", "trl")
_END_OF_STAMP = "__UNSLOTH_VERSIONING__"
_LONGEST_STAMP = 1000  # characters; the files themselves are large


def folder() -> Path:
    """Where Unsloth would look from here."""
    return Path(os.environ.get("UNSLOTH_COMPILE_LOCATION") or "unsloth_compiled_cache").absolute()


def findings(place: Path | None = None, installed: Callable[[str], str | None] = installed_version) -> list[Finding]:
    """
    One line for the cache.

    Args:
        place (`Path`, *optional*): The folder; by default Unsloth's.
        installed (`Callable`, *optional*): The version of a package by its name, or `None`.
    """
    place = folder() if place is None else place
    if not place.is_dir():
        return [Finding("compiled cache", "none yet")]
    now = tuple(installed(name) or "0" for name in _STAMPED)
    stamps = {file: stamp for file in sorted(place.glob("*.py")) if (stamp := read_stamp(file)) is not None}
    stale = {stamp for stamp in stamps.values() if stamp != now}
    if not stale:
        return [Finding("compiled cache", f"{len(stamps)} file(s) of the installed versions in {place}", OK)]
    count = sum(stamp in stale for stamp in stamps.values())
    changed = "; ".join(_difference(stamp, now) for stamp in sorted(stale))
    value = f"{count} of {len(stamps)} file(s) in {place} are of other versions ({changed})"
    return [Finding("compiled cache", value, NOTE, f"Remove the folder, it is made again: rm -r {place}")]


def read_stamp(file: Path) -> tuple[str, ...] | None:
    """The versions in a file's stamp, in the order unsloth_zoo, unsloth, transformers, trl; `None` without a stamp."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        beginning = opened.read(_LONGEST_STAMP)
    if _END_OF_STAMP not in beginning:
        return None
    return tuple(beginning.split(_END_OF_STAMP)[0].strip().strip('"').split())


def _difference(stamp: tuple[str, ...], now: tuple[str, ...]) -> str:
    if len(stamp) != len(now):
        return f"stamped {' '.join(stamp) or 'without versions'}"
    pairs = zip(_STAMPED, stamp, now, strict=True)
    return ", ".join(f"{name} {made}, installed {here}" for name, made, here in pairs if made != here)
