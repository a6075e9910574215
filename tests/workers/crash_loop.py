"""
Kill ranks at random moments, and restart the run until it ends. Of four kills one is aimed at a checkpoint that is being
written, and one at an evaluation.

    crash_loop.py MODEL DATA OUT KILLS LONGEST_S SEED

This process plays the launcher: it imports the heavy libraries once and forks the ranks, so that an attempt takes a
second instead of ten. It forks before anything of accelerate_unsloth is loaded, which each rank does for itself.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
import trl  # noqa: F401

OPTIONS = {
    "args": {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "resume": "auto",
    "evaluate": True,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_rank(rank: int, port: int, arguments: list, log) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    status = 1
    try:
        from tests.workers.train import main

        torch.set_num_threads(1)
        main(*arguments)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(status)


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
    port = free_port()
    ranks = [fork_rank(rank, port, arguments, log) for rank in (0, 1)]
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


def main(model: str, data: str, out: str, kills: str, longest_s: str, seed: str) -> None:
    generator, longest_s = random.Random(int(seed)), float(longest_s)
    arguments, run = [model, data, out], Path(out) / "run"
    killed, steps_seen, half_written, in_evaluation = 0, [], 0, 0
    with (Path(out) / "log.txt").open("w") as log:
        while killed < int(kills):
            victim, options, is_due, aim = generator.randrange(2), OPTIONS, never, killed % 4
            if aim == 1:
                is_due = in_a_save(
                    run / ".incomplete", generator.uniform(0.3, longest_s / 2), generator.uniform(0, 0.02)
                )
            elif aim == 3:
                step = generator.randrange(1, 24)
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
        start = time.monotonic()
        ended = attempt([*arguments, OPTIONS], never, 0, log)
        seconds = time.monotonic() - start
    outcome = {
        "killed": killed,
        "half_written": half_written,
        "in_evaluation": in_evaluation,
        "steps_seen": steps_seen,
    }
    print(json.dumps(outcome | {"ended": ended, "last_attempt_s": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:7])
