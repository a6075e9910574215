"""
Train on samples that are drawn anew each time they are read, and write down who drew what.

    transform.py MODEL OUT
"""

import hashlib
import json
import pickle
import random
import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, MultiGPUTrainer, SFTConfig, SFTTrainer, UnslothPlugin

# isort: split
import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from accelerate_unsloth.launch.topology import topology

ROWS = 8
OWN = random.Random()  # seeded by the system, so that ranks draw other numbers whatever their states are
reads = []


def draw() -> list[int]:
    """One token of each random number generator."""
    return [int(torch.randint(3, 300, ())), int(np.random.randint(3, 300)), random.randrange(3, 300)]


def augment(batch: dict[str, list]) -> dict[str, list]:
    reads.extend(batch["input_ids"])
    ids = [[*draw(), *ids, OWN.randrange(3, 300)] for ids in batch["input_ids"]]
    return {"input_ids": ids, "labels": ids}


class Augmented(torch.utils.data.Dataset):
    """As many samples, of two numbers that are drawn when they are read."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        reads.append(index)
        return torch.rand(2)


def fine_tune(model_folder: str, out: Path) -> dict:
    model, tokenizer = FastLanguageModel.from_pretrained(model_folder, max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    ids = [[index + 3] * 4 for index in range(ROWS)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    rows.set_transform(augment)
    arguments = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(str(out), **arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        plugin=UnslothPlugin(report=False),
    )
    found = {"reads": len(reads), "random_states": random_states()}
    found["draws"] = [drawn_tokens(trainer, seed) for seed in (1, 1, 2)]
    trainer.train()
    return found | {"steps": trainer.state.global_step}


def random_states() -> str:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return hashlib.sha256(pickle.dumps(states)).hexdigest()


def drawn_tokens(trainer, seed: int) -> list[list[int]]:
    """Those of each micro-batch of this rank, in an epoch that begins with `seed`."""
    set_seed(seed)
    return [batch["input_ids"][0, :3].tolist() for slot in trainer.get_train_dataloader() for batch in slot]


def loop() -> dict:
    reads.clear()
    trainer = MultiGPUTrainer(
        torch.nn.Linear(2, 1).requires_grad_(True), loss_fn=lambda model, batch: model(batch).square().mean()
    )
    stats = trainer.train_epoch(DataLoader(Augmented(), batch_size=1))
    return {"reads_of_loop": len(reads), "samples_of_loop": stats.ranks[topology().rank].num_samples}


if __name__ == "__main__":
    out = Path(sys.argv[2])
    found = fine_tune(sys.argv[1], out) | loop()
    (out / f"result{topology().rank}.json").write_text(json.dumps(found))
