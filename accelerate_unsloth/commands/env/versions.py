"""Installed versions against the ranges that this library was tested with, as its own metadata declares them."""

import platform
from collections.abc import Callable, Iterable
from importlib import metadata

from .finding import NOTE, OK, PROBLEM, Finding

_DISTRIBUTION = "accelerate-unsloth"
_ONLY_FOR_UNSLOTH = {"unsloth", "unsloth_zoo", "unsloth-zoo"}


def findings(engine: str | None) -> list[Finding]:
    """
    Python, this library, and every package it requires.

    Args:
        engine (`str`, *optional*): The engine that would be chosen; only Unsloth's own needs Unsloth.
    """
    python = Finding("python", platform.python_version())
    try:
        required = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        remedy = "Install it with pip to have versions checked."
        return [python, Finding(_DISTRIBUTION, "runs from a folder, without metadata", NOTE, remedy)]
    own = Finding(_DISTRIBUTION, metadata.version(_DISTRIBUTION))
    return [python, own, *compare(required, installed_version, engine)]


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compare(required: Iterable[str], installed: Callable[[str], str | None], engine: str | None) -> list[Finding]:
    """
    Hold versions against requirements.

    Args:
        required (`Iterable[str]`): As metadata writes them, such as `"torch<2.15,>=2.11"`; extras are passed over.
        installed (`Callable`): The version of a package by its name, or `None`.
        engine (`str`, *optional*): As for `findings`.

    Returns:
        `list[Finding]`: a missing package is a problem, one outside its range a note: it may work, untested.

    Example:

    ```python
    >>> from accelerate_unsloth.commands.env.versions import compare
    >>> compare(["trl<1.16,>=1.15.0"], {"trl": "1.16.2"}.get, "unsloth")[0].verdict
    'note'
    ```
    """
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in required]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [_compare(requirement, installed(requirement.name), engine) for requirement in wanted]


def _compare(requirement, version: str | None, engine: str | None) -> Finding:
    tested = str(requirement.specifier)
    install = f'pip install "{requirement.name}{tested}"'
    if version is None:
        needed = engine == "unsloth" or requirement.name not in _ONLY_FOR_UNSLOTH
        return Finding(requirement.name, "not installed", PROBLEM if needed else NOTE, install)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version, OK)
    return Finding(requirement.name, f"{version}, tested with {tested}", NOTE, install)
