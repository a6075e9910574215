"""Write down what a script finds when it starts: `interpreter.py OUT`. See tests/unit/test_forking.py."""

import json
import os
import random
import signal
import sys
from pathlib import Path

OURS = [name for name in sys.modules if name.startswith(("accelerate_unsloth", "unsloth"))]

import datasets  # noqa: E402
import numpy  # noqa: E402
import peft  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402, F401

if __name__ == "__main__":
    found = {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "file": __file__,
        "spec": __spec__,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "ours": OURS,
        "leads_its_group": os.getpgrp() == os.getpid(),
        "signals": [str(signal.getsignal(sign)) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "unbuffered": sys.stdout.write_through,
        "excepthook": sys.excepthook is sys.__excepthook__,
        "cache": [str(datasets.config.HF_DATASETS_CACHE), str(datasets.config.HF_MODULES_CACHE)],
        "torch": [
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            str(torch.get_default_dtype()),
        ],
        "torch_seed_is_fixed": torch.initial_seed() == torch.Generator().initial_seed(),
        "verbosity": [transformers.logging.get_verbosity(), datasets.logging.get_verbosity()],
    }
    drawn = [random.random(), float(numpy.random.rand()), torch.initial_seed()]
    (Path(sys.argv[1]) / f"result{os.environ['RANK']}.json").write_text(json.dumps({"found": found, "drawn": drawn}))
