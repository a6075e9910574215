"""Print the parameter names of each `module:qualified.name` given, as JSON; `null` where it does not exist."""

import inspect
import json
import sys
from functools import reduce
from importlib import import_module


def of(points) -> dict:
    return {point: parameters(point) for point in points}


def parameters(point: str):
    module, name = point.split(":")
    try:
        found = reduce(getattr, name.split("."), import_module(module))
    except (AttributeError, ImportError):
        return None
    try:
        return list(inspect.signature(found).parameters) if callable(found) else []
    except ValueError:  # written in C
        return []


if __name__ == "__main__":
    print(json.dumps(of(sys.argv[1:])))
