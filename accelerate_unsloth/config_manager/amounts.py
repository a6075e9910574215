"""Amounts of memory as people write them."""

import math
import re

from ..memory.budget import GIB

_BYTES = {"GB": 10**9, "GIB": GIB, "MB": 10**6, "MIB": 2**20}


def gib(amount: str | float) -> float:
    """
    An amount of memory in GiB.

    Args:
        amount (`str` or `float`):
            A number of GiB, or a text with its unit: `GB` and `MB` are powers of 1000, as in accelerate's `max_memory`,
            `GiB` and `MiB` of 1024.

    Raises:
        ValueError: for anything else.

    Example:

    ```python
    >>> from accelerate_unsloth.config_manager.amounts import gib
    >>> round(gib("80 GB"), 1), gib("24GiB"), gib(24)
    (74.5, 24.0, 24.0)
    ```
    """
    found = None
    if isinstance(amount, str):
        written = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]i?B)\s*", amount, re.IGNORECASE)
        if written:
            found = float(written[1]) * _BYTES[written[2].upper()] / GIB
    elif isinstance(amount, (int, float)) and not isinstance(amount, bool):
        found = float(amount)
    if found is None or not math.isfinite(found) or found <= 0:
        raise ValueError(
            f"available_memory={amount!r} is not an amount of memory above 0. Give a text with its unit, such as "
            "'24GB' or '22.5GiB', or a number of GiB."
        )
    return found
