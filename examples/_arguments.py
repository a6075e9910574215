"""
The command line of the examples: MODEL and OUT, both optional.

Without MODEL an example trains the demo's model, SmolLM2-135M, in `.demo/model` beside this folder. One process of each
machine makes it when it is missing; the others wait, and end with an error when that process fails.
"""

import argparse
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
DEMO = EXAMPLES.parent / ".demo"


def read_arguments(documentation: str) -> tuple[str, Path]:
    """
    Read the command line. `--help` ends here, before anything heavy is imported.

    Args:
        documentation (`str`): Docstring of the example, which `--help` prints.

    Returns:
        `tuple[str, Path]`: the model, as a hub id or folder, and the output folder.
    """
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [MODEL [OUT]]"
    )
    out = DEMO / Path(sys.argv[0]).stem
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"hub id or folder (default: {DEMO / 'model'})")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, default=out, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    return arguments.model or demo_model(), arguments.out


def demo_model() -> str:
    """Return the folder of the demo's model, which the first process of each machine makes when it is missing."""
    from accelerate_unsloth.launch.channel import channel
    from accelerate_unsloth.reliability import failures

    failures.install()  # an error is printed once, and ends every process
    return channel().run_on_local_main("demo model", make_model)


def make_model() -> str:
    """Make the demo's model in a process of its own, because Unsloth has to be imported before transformers."""
    status = subprocess.call([sys.executable, str(EXAMPLES / "demo" / "make_model.py"), str(DEMO / "model")])
    if status != 0:  # it has printed why
        sys.exit(f"The demo's model could not be made, see above. To train another one: {sys.argv[0]} MODEL [OUT]")
    return str(DEMO / "model")
