"""
Verify the installation from Python, as `accelerate-unsloth test` does from the shell.

    python examples/verify_installation.py
"""

import argparse
import sys

from accelerate_unsloth import self_test

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

checks = []
for check in self_test.run():  # as each one is done
    print(check, flush=True)
    checks.append(check)
sys.exit(0 if self_test.passed(checks) else 1)
