"""
Train once undisturbed, and once with ranks that are killed at random moments and restarted until the run ends. Of four kills
one is aimed at a checkpoint that is being written, and one at an evaluation. Written to OUT: `whole`, `killed`, `outcome.json`.

    crash_loop.py MODEL DATA OUT KILLS SEED

This process plays the launcher: it forks the ranks after the heavy libraries are imported, and before anything of
accelerate_unsloth is, which each rank does for itself.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
import trl  # noqa: F401

from tests.workers.by_fork import fork_rank, free_port

OPTIONS = {
    "args": {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "resume": "auto",
    "evaluate": True,
}


def train_as_rank(arguments: list) -> None:
    from tests.workers.train import main

    torch.set_num_threads(1)
    main(*arguments)


def never() -> bool:
    return False


def after(seconds: float):
    """Any moment: loading, training, saving and evaluation all get their share."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


def in_a_save(staging: Path, earliest_s: float, within_s: float):
    """So long after a checkpoint has begun to be written, by this attempt and not before `earliest_s`."""
    started_at, earliest, due_at = time.time(), time.monotonic() + earliest_s, []

    def due() -> bool:
        if not due_at and time.monotonic() > earliest and staging.exists() and staging.stat().st_mtime > started_at:
            due_at.append(time.monotonic() + within_s)
        return bool(due_at) and time.monotonic() > due_at[0]

    return due


def attempt(arguments: list, is_due, victim: int, log) -> bool:
    """One launch of two ranks; `True` if both came to the end before the kill."""
    port, run = free_port(), partial(train_as_rank, arguments)
    ranks = [fork_rank(run, rank, 2, port, log) for rank in (0, 1)]
    running, failed = set(ranks), False
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            running.discard(child)
            failed = failed or status != 0
        elif is_due():
            if ranks[victim] in running:
                os.kill(ranks[victim], signal.SIGKILL)
            is_due = never
        else:
            time.sleep(0.002)
        if failed:  # as the launcher does
            for other in running:
                os.kill(other, signal.SIGKILL)
    return not failed


def train_undisturbed(arguments: list) -> float:
    """Return the seconds that it took."""
    start = time.monotonic()
    with (arguments[2] / "log.txt").open("w") as log:
        assert attempt([*arguments, OPTIONS], never, 0, log), (arguments[2] / "log.txt").read_text()[-3000:]
    return time.monotonic() - start


def main(model: str, data: str, out: str, kills: str, seed: str) -> None:
    out, generator = Path(out), random.Random(int(seed))
    for name in ("whole", "killed"):
        (out / name).mkdir()
    longest_s = train_undisturbed([model, data, out / "whole"])
    arguments, run = [model, data, out / "killed"], out / "killed" / "run"
    killed, steps_seen, half_written, in_evaluation = 0, [], 0, 0
    with (out / "killed" / "log.txt").open("w") as log:
        while killed < int(kills):
            victim, options, is_due, aim = generator.randrange(2), OPTIONS, never, killed % 4
            if aim == 1:
                is_due = in_a_save(
                    run / ".incomplete", generator.uniform(0.3, longest_s / 2), generator.uniform(0, 0.02)
                )
            elif aim == 3:
                step = generator.randrange(1, 20)
                options = OPTIONS | {"provoke": {"what": "kill_in_evaluation", "rank": victim, "step": step}}
            else:
                is_due = after(generator.uniform(0.3, longest_s))
            if attempt([*arguments, options], is_due, victim, log):
                for checkpoint in run.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
                continue
            killed, in_evaluation = killed + 1, in_evaluation + (aim == 3)
            half_written += (run / ".incomplete").exists()
            steps_seen.append(max([int(c.name[11:]) for c in run.glob("checkpoint-*")], default=0))
        ended = attempt([*arguments, OPTIONS], never, 0, log)
    outcome = {
        "killed": killed,
        "half_written": half_written,
        "in_evaluation": in_evaluation,
        "steps_seen": steps_seen,
        "ended": ended,
    }
    (out / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:6])
