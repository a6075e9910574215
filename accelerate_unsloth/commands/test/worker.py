"""
Fine-tune the tiny model, as a user's script would, and write down what this rank saw.

    accelerate launch -m accelerate_unsloth.commands.test.worker FOLDER NAME ACCUMULATION PRECISION
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer

# isort: split
import datasets
import torch

from .tiny import SAMPLES, make_texts

STEPS = 6


def main(folder: str, name: str, accumulation: str, precision: str) -> None:
    folder, rank = Path(folder), int(os.environ.get("RANK", 0))
    out = folder / name
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder / "model"), max_seq_length=128, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=False)
    arguments = SFTConfig(
        str(out / "run"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=int(accumulation),
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=precision == "float32",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=3,
    )
    rows = datasets.Dataset.from_json(str(folder / "data.jsonl"), cache_dir=str(out / "json_cache"))
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "weights": checksum(model),
        "logits": logits(model, tokenizer),
    }
    (out / f"rank{rank}.json").write_text(json.dumps(report))


def checksum(model) -> str:
    """Of the trained weights, bit for bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def logits(model, tokenizer) -> list[float]:
    """What the trained model says to a text that it has not seen."""
    FastLanguageModel.for_inference(model)
    text = make_texts(SAMPLES + 1)[-1]
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    # As under Unsloth's own generation: adapters are float32 there, and the base model is not.
    with torch.autocast(ids.device.type, dtype=model.dtype, enabled=ids.is_cuda):
        return model(input_ids=ids).logits.float().flatten().tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
