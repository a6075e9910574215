"""
Run an unmodified training script with `enable_multi_gpu()` before its first line.

    python -m accelerate_unsloth train.py --its arguments
    accelerate launch --config_file FILE -m accelerate_unsloth train.py --its arguments

`ACCELERATE_UNSLOTH_ENABLE=0` runs the script without it, to compare; the default is `1`. The other
`ACCELERATE_UNSLOTH_*` variables set the options.
"""

import runpy
import sys
from pathlib import Path

from . import patch
from .launch import command as launch_command
from .plugin import enabled_by_environment


def main(command: list[str]) -> None:
    """Enable multi-GPU training, then run a script with its arguments as `python` would."""
    if not command or command[0] in ("-h", "--help"):
        print(__doc__.strip(), file=sys.stdout if command else sys.stderr)
        raise SystemExit(0 if command else 2)
    script = command[0]
    if not Path(script).is_file():
        print(
            f"accelerate_unsloth: {script!r} is not a file here ({Path.cwd()}). Give the script before its arguments.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    launch_command.run_through = "accelerate_unsloth"
    if enabled_by_environment():
        patch.enable_multi_gpu()
    sys.argv = command
    if not getattr(sys.flags, "safe_path", False):  # python -P puts no folder there
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
