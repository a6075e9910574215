"""
Keep what an import creates out of Python's garbage collections.

`import unsloth` leaves about 700,000 objects, which live as long as the process. Each full collection visits all of them
(0.3 s), and Unsloth asks for about 15 collections while it loads a model, adds adapters and starts training (unsloth
2026.10.9, `models/llama.py`; unsloth_zoo 2026.10.9, `patching_utils.py`). Without this the import itself takes 4 of 12 s
longer. The cost: reference cycles that the import leaves are never freed, about 37,000 small objects.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_import() -> Iterator[None]:
    """Run the body without collections, then take all objects that exist out of later ones; after an error, none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
