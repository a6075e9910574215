"""
Launch the demo: on all GPUs with Unsloth, or on two CPU processes with the reference engine.

    python examples/demo/run.py
"""

import argparse
import os
import subprocess
import sys

import torch

from accelerate_unsloth.launch import configs


def main() -> int:
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(configs.path("unsloth_ddp" if gpus else "unsloth_ddp_cpu"))]
    command += ["examples/train.py", "--config", "examples/demo/train.yaml"]
    # A CPU without bfloat16 instructions emulates them, slowly.
    command += [] if gpus else ["--use_cpu", "True", "--bf16", "False"]
    print(" ".join(command), flush=True)
    return subprocess.call(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
