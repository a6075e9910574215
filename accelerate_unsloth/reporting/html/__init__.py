"""
`training_report.html`: what ran, on what, how long, and where the time went, in one file that needs nothing else.

    record.py   what is known of a run, as plain values
    figures.py  the arithmetic: headline, where the time went, each rank
    charts.py   drawings, as SVG that takes on the page's colours
    page.py     HTML; every text passes through one function, which escapes it and hides secrets (`masking.py`)

Rank 0 writes it when training ends, from what logging steps brought there anyway.
"""

import os
from pathlib import Path

from . import page
from .record import Record, collect

__all__ = ["FILE_NAME", "Record", "collect", "write"]

FILE_NAME = "training_report.html"


def write(record: Record, folder: Path) -> Path:
    """
    Write the report into a folder, complete or not at all.

    Args:
        record ([`Record`]): Of the run.
        folder (`Path`): Where `training_report.html` shall be; made if need be. An older report is replaced.

    Raises:
        OSError: if it cannot be written.

    Example:

    ```python
    >>> import tempfile
    >>> from accelerate_unsloth import training_report
    >>> record = training_report.Record(model="tiny", steps=1, max_steps=1, log_history=[{"step": 1, "loss": 2.0}])
    >>> training_report.write(record, tempfile.mkdtemp()).name
    'training_report.html'
    ```
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{FILE_NAME}.incomplete"
    try:
        written.write_text(page.render(record), encoding="utf-8")  # with the permissions of the user's umask
        os.replace(written, folder / FILE_NAME)
    finally:
        written.unlink(missing_ok=True)
    return folder / FILE_NAME
