"""Ranks that a process forks by itself, after it has imported what is heavy."""

import os
import socket

from tests.forking.launched import end_with


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_rank(function, rank: int, world_size: int, port: int, log) -> int:
    """Call `function` in a forked process that a launcher seems to have started; its pid."""
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    return end_with(function)
