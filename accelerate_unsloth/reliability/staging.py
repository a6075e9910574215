"""
The folder that all ranks write a checkpoint into before rank 0 publishes it, on machines that share a disk or do not.

A process that begins to write while another still clears the folder loses its files without an error. So all ranks wait
until every machine has cleared. That costs three short messages a checkpoint.
"""

import functools
import shutil
import uuid
from pathlib import Path

from ..launch.channel import channel
from ..launch.topology import topology


def prepare(folder: Path) -> bool:
    """
    Empty `folder` on every machine, and make it, before any rank writes into it. All ranks call it together.

    Args:
        folder (`Path`): The same on all ranks; on a disk of each machine, or on one that some or all of them share.

    Returns:
        `bool`: whether this rank writes to the disk of rank 0. Only what lies there is published.

    Raises:
        OSError: if it cannot be made.
    """
    channel().run_on_local_main("clear", functools.partial(shutil.rmtree, folder, ignore_errors=True))
    channel().gather("cleared", True)  # another machine may share the disk and still be clearing
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex  # a name that no client of a network disk can have looked up before
    if topology().is_main:
        (folder / token).touch()
    token = channel().gather("staging", token)[0]
    return (folder / token).exists()


def gather_required(names: list[str], shares_disk: bool) -> list[str]:
    """
    Wait until all ranks have written; return the files that have to lie on the disk of rank 0.

    Args:
        names (`list[str]`): What this rank has written, relative to the checkpoint.
        shares_disk (`bool`): What [`prepare`] returned.
    """
    written = channel().gather("written", names if shares_disk else [])
    return sorted({name for rank in written for name in rank})
