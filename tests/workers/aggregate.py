"""
A model of one weight whose gradient is the value of its batch, and what goes wrong on one rank.

    aggregate.py OUT mean|sum|samples|frozen|"learning rate"|"not finite"|"an error on one rank"
"""

import json
import sys
from pathlib import Path

from accelerate_unsloth import MultiGPUTrainer

# isort: split
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate_unsloth.topology import topology

VALUES = [1.0, 2.0, 4.0, 8.0, 16.0]


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        frozen = torch.full((3,), float(what == "frozen" and topology().rank == 1))
        self.frozen = torch.nn.Parameter(frozen, requires_grad=False)


class Values(IterableDataset):
    def __iter__(self):
        for value in VALUES:
            if what == "an error on one rank" and topology().rank == 1 and value == 2.0:
                raise RuntimeError("this loader is broken")
            yield torch.tensor([value], dtype=torch.float64)


def loss_fn(model, batch):
    bad = what == "not finite" and topology().rank == 1
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
    rows = torch.ones(5 + topology().rank, 1) if what == "samples" else Values()
    stats = trainer.train_epoch(DataLoader(rows, batch_size=1))
    counts = [rank.num_samples for rank in stats.ranks]
    if topology().rank == 0:
        found = {"gradients": gradients, "rank_batches": counts}
        (Path(sys.argv[1]) / "result.json").write_text(json.dumps(found))


def is_other() -> bool:
    return what == "learning rate" and topology().rank == 1


if __name__ == "__main__":
    what = sys.argv[2]
    main()
