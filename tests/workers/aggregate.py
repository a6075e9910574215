"""
A model of one weight whose gradient is the value of its batch, and what goes wrong on one rank.

    aggregate.py OUT mean|sum|samples|contents|max_steps|frozen|"learning rate"|"not finite"|"an error on one rank"|
        "an error of the sampler"
"""

import json
import sys
from pathlib import Path

from accelerate_unsloth import MultiGPUTrainer

# isort: split
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate_unsloth.launch.channel import channel
from accelerate_unsloth.launch.topology import topology

VALUES = [1.0, 2.0, 4.0, 8.0, 16.0]


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        frozen = torch.full((3,), float(what == "frozen" and topology().rank == 1))
        self.register_buffer("seen", torch.zeros(()))
        self.frozen = torch.nn.Parameter(frozen, requires_grad=False)


class Values(IterableDataset):
    def __iter__(self):
        for value in VALUES:
            if what == "an error on one rank" and topology().rank == 1 and value == 2.0:
                raise RuntimeError("this loader is broken")
            yield torch.tensor([value], dtype=torch.float64)


def loss_fn(model, batch):
    bad = what == "not finite" and topology().rank == 1
    model.seen += batch.sum()
    return (model.weight * batch.sum()).sum() * (float("nan") if bad else 1.0)


def main() -> None:
    model = Weight()
    gradients, counts = [], []
    trainer = MultiGPUTrainer(
        model=model,
        aggregation_method=what if what in ("mean", "sum") else None,
        optimizer_config={"class": torch.optim.SGD, "kwargs": {"lr": 0.02 if is_other() else 0.01}},
        loss_fn=loss_fn,
    )
    before = 0.0

    def note(logs, step):
        nonlocal before
        gradients.append((before - model.weight.item()) / 0.01)
        before = model.weight.item()

    trainer.callbacks.append(note)
    stats = trainer.train_epoch(loader(), max_steps_of_rank())
    buffers = channel().gather("buffers", model.seen.item())
    counts = [rank.num_samples for rank in stats.ranks]
    if topology().rank == 0:
        found = {"gradients": gradients, "rank_batches": counts, "buffers": buffers}
        (Path(sys.argv[1]) / "result.json").write_text(json.dumps(found))


def loader() -> DataLoader:
    if what == "an error of the sampler":
        return DataLoader(torch.ones(5, 1), batch_size=1, sampler=BrokenSampler())
    return DataLoader(rows_of_rank(topology().rank), batch_size=1)


class BrokenSampler:
    def __len__(self):
        return 5

    def __iter__(self):
        raise RuntimeError("this sampler is broken")


def rows_of_rank(rank: int):
    other = {"samples": torch.ones(5 + rank, 1), "contents": torch.full((6, 1), 1.0 + rank)}
    return other.get(what, Values())


def max_steps_of_rank() -> int | None:
    return 1 + topology().rank if what == "max_steps" else None


def is_other() -> bool:
    return what == "learning rate" and topology().rank == 1


if __name__ == "__main__":
    what = sys.argv[2]
    main()
