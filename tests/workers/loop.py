"""
Trainings of the tiny model in custom loops, one after the other in the same processes, and what came of each.

    loop.py MODEL DATA OUT '{"name": {options}, ...}'
"""

import json
import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, MultiGPUTrainer, UnslothPlugin

# isort: split
import datasets
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from accelerate_unsloth.launch.topology import topology


def load(model_folder: str):
    model, tokenizer = FastLanguageModel.from_pretrained(model_folder, max_seq_length=128)
    torch.manual_seed(5)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def tokenised(data_file: str, tokenizer) -> datasets.Dataset:
    """Prompts masked; lengths as uneven as the data's."""
    rows = [json.loads(line) for line in Path(data_file).read_text().splitlines()]
    samples = []
    for row in rows:
        prompt, completion = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        ids = [*prompt, *completion][:128]
        samples.append({"input_ids": ids, "labels": ([-100] * len(prompt) + completion)[:128]})
    return datasets.Dataset.from_list(samples)


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


class Stream(IterableDataset):
    """The same rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def loader_of(rows, options: dict) -> DataLoader:
    if options.get("stream"):
        return DataLoader(Stream(list(rows)), batch_size=options["batch"], collate_fn=pad)
    if options.get("own_sampler"):  # which draws something else on each rank, and each time
        generator = torch.Generator().manual_seed(topology().rank)
        sampler = SubsetRandomSampler(range(len(rows)), generator=generator)
        return DataLoader(rows, batch_size=options["batch"], sampler=sampler, collate_fn=pad)
    return DataLoader(rows, batch_size=options["batch"], shuffle=True, collate_fn=pad)


def train(model_folder: str, data_file: str, out: Path, options: dict) -> dict:
    model, tokenizer = load(model_folder)
    rows, logs = tokenised(data_file, tokenizer), []
    if "samples" in options:
        rows = rows.select(range(options["samples"]))
    trainer = MultiGPUTrainer(
        model=model,
        aggregation_method=options.get("method"),
        optimizer_config={"class": torch.optim.AdamW, "kwargs": {"lr": 1e-2, "weight_decay": 0.01}},
        scheduler_config={"class": torch.optim.lr_scheduler.ExponentialLR, "kwargs": {"gamma": 0.9}},
        gradient_accumulation_steps=options["accumulation"],
        max_grad_norm=1.0,
        callbacks=[lambda entry, step: logs.append(entry | {"step": step})],
        seed=3,
        plugin=UnslothPlugin(**options.get("plugin", {})),
    )
    loader = loader_of(rows, options)
    if "load" in options:
        trainer.load_checkpoint(options["load"])
    before = trainer.evaluate(loader) if options.get("evaluate") else None
    all_stats = [trainer.train_epoch(loader, max_steps=max_steps) for max_steps in options.get("epochs", [None])]
    if "save" in options:
        trainer.save_checkpoint(options["save"])
    own = [
        int(ids[mask == 1].sum())
        for batch in trainer.batches(loader)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, out / f"weights{topology().rank}.safetensors")
    return {
        "logs": logs,
        "stats": [
            {"loss": s.loss, "tokens": s.num_tokens, "samples": s.num_samples, "steps": s.num_steps}
            | {"ranks": [[rank.num_tokens, rank.num_samples] for rank in s.ranks], "imbalance": s.token_imbalance}
            for s in all_stats
        ],
        "evaluation": before,
        "gathered": trainer.gather(own),
        "expected": [sum(row) for row in rows["input_ids"]],
        "reason": trainer.aggregation.reason,
        "position": [trainer.epoch, trainer.step_in_epoch, trainer.global_step],
    }


if __name__ == "__main__":
    from accelerate import PartialState

    for name, options in json.loads(sys.argv[4]).items():
        folder = Path(sys.argv[3]) / name
        folder.mkdir(parents=True, exist_ok=True)
        found = train(sys.argv[1], sys.argv[2], folder, options)
        (folder / f"result{PartialState().process_index}.json").write_text(json.dumps(found))
