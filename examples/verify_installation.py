"""
Verify the installation from Python, as `accelerate-unsloth test` does from the shell.

    python examples/verify_installation.py
"""

import argparse
import sys

from accelerate_unsloth.commands.test.run import passed, run

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

checks = []
for check in run():  # as each one is done
    print(check, flush=True)
    checks.append(check)
sys.exit(0 if passed(checks) else 1)
