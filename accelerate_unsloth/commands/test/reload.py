"""
Load a saved adapter with plain transformers and PEFT, without this library, and write down what it computes.

    python -m accelerate_unsloth.commands.test.reload FOLDER NAME
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .tiny import SAMPLES, make_texts


@torch.no_grad()
def main(folder: str, name: str) -> None:
    folder, text = Path(folder), make_texts(SAMPLES + 1)[-1]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    # The tokenizer that was saved beside the adapter.
    ids = AutoTokenizer.from_pretrained(folder / name / "adapter")(text, return_tensors="pt").input_ids
    outputs = {"base": base(ids).logits.flatten().tolist()}
    adapted = PeftModel.from_pretrained(base, folder / name / "adapter", torch_device="cpu").eval()
    outputs["reloaded"] = adapted(ids).logits.flatten().tolist()
    (folder / name / "reloaded.json").write_text(json.dumps(outputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
