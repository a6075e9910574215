"""What the fork server imports before its first fork. It never imports accelerate_unsloth: the forked scripts do."""

import gc
import os
import sys
from importlib import import_module

# What the workers end up with, including what transformers and trl import on first use only. Nothing is called, and
# no tensor is made, because threads do not survive a fork.
_HEAVY = (
    "accelerate.commands.launch",
    "datasets",
    "peft",
    "safetensors.torch",
    "tokenizers",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
)

MAIN = sys.modules["__main__"]  # the module that dill and others take their `__main__` from when they are imported
PATH = list(sys.path)
_before = dict(os.environ)
for _name in _HEAVY:
    import_module(_name)
SET_BY_IMPORTS = dict(os.environ.items() - _before.items())
gc.freeze()  # or the first collection of each forked process would touch, and so copy, all of their memory
