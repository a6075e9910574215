"""
The run of `workers/train.py` by TRL's own trainer, on one process, with a checkpoint every two steps.

    stock.py MODEL DATA OUT
"""

import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, SFTConfig

# isort: split
import datasets
import torch
import trl
from safetensors.torch import save_file

from accelerate_unsloth.trainers import log_probs  # TRL's loss needs it on a CPU
from accelerate_unsloth.trainers.reference import ReferenceArguments
from tests.workers.train import ARGUMENTS

log_probs.install()


class StockTrainer(ReferenceArguments, trl.SFTTrainer):
    """TRL's trainer, on a device whose name a checkpoint can be loaded to."""


def main(model_folder: str, data_file: str, out: str) -> None:
    out = Path(out)
    model, tokenizer = FastLanguageModel.from_pretrained(model_folder, max_seq_length=128)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    trainer = StockTrainer(
        model,
        SFTConfig(
            str(out / "run"),
            **ARGUMENTS | {"gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 2},
        ),
        train_dataset=datasets.Dataset.from_json(data_file, cache_dir=str(out / "json_cache")),
        processing_class=tokenizer,
    )
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, out / "weights0.safetensors")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:4])
