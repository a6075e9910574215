"""
Import the real Unsloth once, and write down what many tests look at: its signatures, our loaders, and a training in one and
in two processes, which are forked.

    unsloth_once.py MODEL EXPERTS DATA PREFERENCES OUT
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

from tests.workers import unsloth_trainer  # imports Unsloth, before everything that it patches

# isort: split
from tests.launch.test_patched_points import UNSLOTH_POINTS
from tests.workers import by_fork, signatures, unsloth_loader


def train(
    world_size: int, accumulation: int, model: str, experts: str, data: str, preferences: str, out: Path
) -> None:
    """Write `out/result<rank>.json` of each rank."""
    out.mkdir()
    port = by_fork.free_port()
    run = partial(unsloth_trainer.main, model, experts, data, preferences, str(out), str(accumulation))
    with (out / "log.txt").open("w") as log:
        ranks = [by_fork.fork_rank(run, rank, world_size, port, log) for rank in range(world_size)]
        statuses = [os.waitpid(rank, 0)[1] for rank in ranks]
    assert statuses == [0] * world_size, (out / "log.txt").read_text()[-4000:]


def main(model: str, experts: str, data: str, preferences: str, out: str) -> None:
    out = Path(out)
    for world_size, accumulation in ((1, 4), (2, 2)):
        train(world_size, accumulation, model, experts, data, preferences, out / str(world_size))
    (out / "points.json").write_text(json.dumps(signatures.of(UNSLOTH_POINTS)))
    (out / "loaders.json").write_text(json.dumps(unsloth_loader.report()))
    with (out / "fetched.txt").open("w") as log:
        loading = by_fork.fork_rank(partial(unsloth_loader.load_fetched, model, out), 0, 1, by_fork.free_port(), log)
        os.waitpid(loading, 0)


if __name__ == "__main__":
    main(*sys.argv[1:6])
