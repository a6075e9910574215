"""
Train a small and a large model for two steps each, and write down what the large one adds to the memory of all processes.

    shared_weights.py SMALL_MODEL LARGE_MODEL OUTPUT_FILE
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel

# isort: split
import psutil
import torch

from accelerate_unsloth.launch.channel import channel
from accelerate_unsloth.launch.topology import topology
from accelerate_unsloth.weights import placed_weights


def trained(folder: str):
    """Return a model after two steps, which have read all of its weights."""
    model, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(8)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def pss_of_all() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    channel().gather("trained", True)  # a page is counted in parts, one for each process that has mapped it
    return sum(channel().gather("pss", psutil.Process().memory_full_info().pss))


def main(small: str, large: str, out: str) -> None:
    trained(small)
    before = pss_of_all()
    model = trained(large)
    found = {
        "added_bytes": pss_of_all() - before,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "mode": placed_weights(model).choice.mode,
    }
    if topology().is_main:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])
