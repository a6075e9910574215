"""Print the parameter names of each `module:qualified.name` given, as JSON; `null` where it does not exist."""

import inspect
import json
import os
import sys
from functools import reduce
from importlib import import_module

if any(point.startswith("unsloth") for point in sys.argv[1:]):
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    import unsloth  # noqa: F401


def parameters(point: str):
    module, name = point.split(":")
    try:
        found = reduce(getattr, name.split("."), import_module(module))
    except (AttributeError, ImportError):
        return None
    return list(inspect.signature(found).parameters) if callable(found) else []


print(json.dumps({point: parameters(point) for point in sys.argv[1:]}))
