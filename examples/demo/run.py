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
    where = f"all {gpus} GPU(s), with Unsloth" if gpus else "two CPU processes, because no GPU is visible"
    print(f"\nFine-tuning SmolLM2-135M-Instruct on {where}:\n  {' '.join(command)}\n", flush=True)
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.call(command, env=os.environ | quiet)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
