"""
One step on a data set of very many samples, which a custom sampler draws in another order on each rank.

    drawn_order.py OUT SAMPLES
"""

import json
import sys
from pathlib import Path

from accelerate_unsloth import MultiGPUTrainer

# isort: split
import torch
from torch.utils.data import DataLoader, Dataset

from accelerate_unsloth.launch.topology import topology


class Numbers(Dataset):
    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((1,), index / self.length)


class Reversed:
    """From the last sample of rank 0 and from the first one of the others."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(range(self.length - 1, -1, -1) if topology().rank == 0 else range(self.length))


def main(out: Path, samples: int) -> None:
    trainer = MultiGPUTrainer(torch.nn.Linear(1, 1), loss_fn=lambda model, batch: model(batch).square().mean())
    loader = DataLoader(Numbers(samples), batch_size=2, sampler=Reversed(samples))
    trainer.train_epoch(loader, max_steps=1)
    order = [index for batch in trainer.epoch_order for index in batch]
    found = {"first": order[:3], "length": len(order)}
    (out / f"result{topology().rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
