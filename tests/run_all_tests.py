"""
The whole suite, with the launches that `make test` leaves out: `python tests/run_all_tests.py`.

`--quick` runs the part that starts no launch and imports no Unsloth, in under two minutes; further arguments go to pytest.
"""

import sys
from pathlib import Path

import pytest

QUICK = "not launch and not unsloth and not slow and not gpu"


def main(arguments: list[str]) -> int:
    quick = "--quick" in arguments
    others = [argument for argument in arguments if argument != "--quick"]
    # An empty expression takes every test, whatever pyproject.toml leaves out.
    return pytest.main(["-m", QUICK if quick else "", str(Path(__file__).parent), *others])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
