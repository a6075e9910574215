"""
What the installation check starts, as a user's script would do it.

    accelerate launch -m accelerate_unsloth.commands.test.worker train FOLDER NAME ACCUMULATION PRECISION
    python -m accelerate_unsloth.commands.test.worker reload FOLDER NAME
"""

import json
import os
import sys
from pathlib import Path

from ...testing.tiny_model import CHECK_SAMPLES, make_texts

STEPS = 6
UNSEEN = make_texts(CHECK_SAMPLES + 1)[-1]


def train(folder: str, name: str, accumulation: str, precision: str) -> None:
    """Fine-tune the model, and write what this rank saw to `rank<N>.json`."""
    from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer  # isort: skip
    import datasets

    from ...reliability.checksum import bit_sums

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
    FastLanguageModel.for_inference(model)
    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "weights": bit_sums({name: p for name, p in model.named_parameters() if p.requires_grad}),
        "logits": logits(model, tokenizer),
    }
    (out / f"rank{rank}.json").write_text(json.dumps(report))


def logits(model, tokenizer) -> list[float]:
    """Return what a model computes for a text that it has not seen."""
    import torch

    ids = tokenizer(UNSEEN, return_tensors="pt").input_ids.to(model.device)
    # As under Unsloth's own generation: adapters are float32 there, and the base model is not.
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=model.dtype, enabled=ids.is_cuda):
        return model(input_ids=ids).logits.float().flatten().tolist()


def reload(folder: str, name: str) -> None:
    """Load the saved adapter with plain transformers and PEFT, and write what it computes to `reloaded.json`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / name / "adapter")  # that was saved beside the adapter
    outputs = {"base": logits(base, tokenizer)}
    adapted = PeftModel.from_pretrained(base, folder / name / "adapter", torch_device="cpu").eval()
    outputs["reloaded"] = logits(adapted, tokenizer)
    (folder / name / "reloaded.json").write_text(json.dumps(outputs))


if __name__ == "__main__":
    {"train": train, "reload": reload}[sys.argv[1]](*sys.argv[2:])
