"""
Run the Python blocks of pages in a folder, page by page: `documented.py FILE FOLDER`; FILE is `{page: [block, ...]}` in JSON.

Trainings last two steps, on the CPU.
"""

import json
import os
import sys
from pathlib import Path

import accelerate_unsloth
from accelerate_unsloth import SFTTrainer  # noqa: F401  # before transformers

# isort: split
from transformers import TrainingArguments

post_init = TrainingArguments.__post_init__


def short_and_on_the_cpu(args):
    args.use_cpu, args.max_steps, args.report_to = True, 2, "none"
    post_init(args)


TrainingArguments.__post_init__ = short_and_on_the_cpu
os.chdir(sys.argv[2])
for page, blocks in json.loads(Path(sys.argv[1]).read_text()).items():
    names = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    accelerate_unsloth.disable_multi_gpu()
    print(f"ran {len(blocks)} block(s) of {page}")
