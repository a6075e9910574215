"""
What this machine and installation would do with a training run, and what stands in its way.

Everything that imports heavy libraries happens in one short process of its own, so that an import that crashes is
reported instead of taking the report down.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from .finding import NOTE, OK, PROBLEM, Finding

__all__ = ["NOTE", "OK", "PROBLEM", "Finding", "can_train", "examine"]


def examine() -> list[Finding]:
    """
    Look at versions, libraries, GPUs, automatic choices, the launcher's environment, caches and space.

    Takes as long as importing the libraries that train does: with Unsloth about half a minute.

    Returns:
        `list[Finding]`

    Example:

    ```python
    >>> from accelerate_unsloth import environment
    >>> findings = environment.examine()
    >>> problems = [finding.subject for finding in findings if finding.verdict == environment.PROBLEM]
    ```
    """
    from ...devices.manager import DeviceManager
    from . import choices, compiled_cache, hardware, launcher, libraries, space, versions

    manager = DeviceManager()
    devices = manager.get_available_devices()
    loaded = libraries.load()
    kernels = loaded.records.get("unsloth", {}).get("kernels")
    chosen = choices.findings(loaded.visible_gpus(len(devices)), devices, kernels)
    return [
        *versions.findings(chosen.engine),
        *libraries.findings(loaded, len(devices)),
        *hardware.findings(devices, manager.notes, manager.driver),
        *chosen.findings,
        *launcher.findings(os.environ),
        *compiled_cache.findings(),
        *space.findings(Path.cwd()),
    ]


def can_train(findings: Iterable[Finding]) -> bool:
    """Whether none of the findings is a problem."""
    return all(finding.verdict != PROBLEM for finding in findings)
