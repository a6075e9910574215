"""
Run a training script as it is, with `enable_multi_gpu()` before its first line.

    python -m accelerate_unsloth train.py --its arguments
    accelerate launch --config_file FILE -m accelerate_unsloth train.py --its arguments

`ACCELERATE_UNSLOTH_ENABLE=0` runs the script without it, to compare; `1` says what happens anyway. The other
`ACCELERATE_UNSLOTH_*` variables set the options.
"""

import os
import runpy
import sys

from . import patch
from .launch import command as launch_command
from .plugin import enabled_by_environment


def main(command: list[str]) -> None:
    """
    Run a script as `python` would, after enabling.

    Args:
        command (`list[str]`): The script and its arguments.

    Raises:
        SystemExit: with status 2 if there is no such script.
    """
    if not command or command[0] in ("-h", "--help"):
        print(__doc__.strip(), file=sys.stdout if command else sys.stderr)
        raise SystemExit(0 if command else 2)
    script = command[0]
    if not os.path.isfile(script):
        print(
            f"accelerate_unsloth: {script!r} is not a file here ({os.getcwd()}). Name the script to run first, and its "
            "arguments after it.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    launch_command.run_through = "accelerate_unsloth"
    if enabled_by_environment():
        patch.enable_multi_gpu()
    sys.argv = command
    if not getattr(sys.flags, "safe_path", False):  # python -P puts no folder there
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
