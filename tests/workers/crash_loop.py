"""
Kill ranks at random moments, and restart the run until it ends.

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


def fork_rank(rank: int, port: int, arguments: list[str], log) -> int:
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
        main(*arguments, OPTIONS)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(status)


def attempt(arguments: list[str], kill_after_s: float | None, victim: int, log) -> bool:
    """One launch of two ranks; `True` if both came to the end before the kill."""
    port = free_port()
    ranks = [fork_rank(rank, port, arguments, log) for rank in (0, 1)]
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    running, failed = set(ranks), False
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            running.discard(child)
            failed = failed or status != 0
        elif deadline is not None and time.monotonic() > deadline:
            if ranks[victim] in running:
                os.kill(ranks[victim], signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.005)
        if failed:  # as the launcher does
            for other in running:
                os.kill(other, signal.SIGKILL)
    return not failed


def main(model: str, data: str, out: str, kills: str, longest_s: str, seed: str) -> None:
    generator = random.Random(int(seed))
    arguments, killed, steps_seen = [model, data, out], 0, []
    with (Path(out) / "log.txt").open("w") as log:
        while killed < int(kills):
            # Between the fork and the end of a whole run: loading, training, saving and evaluation all get their share.
            if attempt(arguments, generator.uniform(0.3, float(longest_s)), generator.randrange(2), log):
                for checkpoint in (Path(out) / "run").glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
                continue
            killed += 1
            steps_seen.append(max([int(c.name[11:]) for c in (Path(out) / "run").glob("checkpoint-*")], default=0))
        start = time.monotonic()
        ended = attempt(arguments, None, 0, log)
        seconds = time.monotonic() - start
    print(json.dumps({"killed": killed, "ended": ended, "steps_seen": steps_seen, "last_attempt_s": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:7])
