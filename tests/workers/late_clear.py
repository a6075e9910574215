"""
Save many checkpoints on two machines, the second of which is late: it clears a staging folder only when rank 0 has done so
and has begun to wait for the other ranks.

    late_clear.py MODEL DATA OUT TURNS
"""

import json
import sys
import time
from pathlib import Path

from accelerate_unsloth import MultiGPUTrainer

# isort: split
import torch
import transformers
from torch.utils.data import DataLoader

from accelerate_unsloth.launch.channel import Channel
from accelerate_unsloth.launch.topology import topology
from tests.workers import train

LOOP_SAVES = 20


class LateClear:
    """Holds the second machine's clearing back. `turns` is a folder that both machines see."""

    def __init__(self, turns: Path):
        self.turns, self.clears, self.has_cleared = turns, 0, False
        self.run_on_local_main, self.gather = Channel.run_on_local_main, Channel.gather
        late = self
        Channel.run_on_local_main = lambda channel, name, function: late.clear(channel, name, function)
        Channel.gather = lambda channel, name, value: late.meet(channel, name, value)

    def clear(self, channel, name, function):
        if name != "clear":
            return self.run_on_local_main(channel, name, function)
        self.clears += 1
        result = self.run_on_local_main(channel, name, function if topology().node == 0 else self.late(function))
        self.has_cleared = True
        return result

    def late(self, function):
        def wait_and_clear():
            while not (self.turns / str(self.clears)).exists():
                time.sleep(0.005)
            return function()

        return wait_and_clear

    def meet(self, channel, name, value):
        """Let the second machine clear as soon as rank 0, which has cleared, waits for all ranks."""
        if topology().is_main and self.has_cleared:
            (self.turns / str(self.clears)).touch()
            self.has_cleared = False
        return self.gather(channel, name, value)


def save_in_a_loop(out: Path) -> None:
    torch.manual_seed(0)
    trainer = MultiGPUTrainer(torch.nn.Linear(2, 1), loss_fn=lambda model, batch: model(batch).square().mean())
    trainer.train_epoch(DataLoader(torch.ones(8, 2), batch_size=1))
    for number in range(LOOP_SAVES):
        trainer.save_checkpoint(out / "loop" / str(number))


def main(model: str, data: str, out: str, turns: str) -> None:
    late = LateClear(Path(turns))
    save_in_a_loop(Path(out))
    # A collective that would keep rank 0 from writing ahead; the Trainer leaves it out in a hyperparameter search.
    transformers.Trainer.store_flos = lambda self: None
    train.main(model, data, out, {"args": {"save_strategy": "steps", "save_steps": 1}})
    (Path(out) / f"clears{topology().rank}.json").write_text(json.dumps(late.clears))


if __name__ == "__main__":
    main(*sys.argv[1:5])
