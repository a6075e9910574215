"""Set-up of a process before CUDA and the process group start."""

import atexit
import ctypes
import os
import signal
import socket
import sys

from .channel import channel
from .topology import Topology, attempt, is_located, relocate, topology

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """
    Let the kernel send SIGTERM to this process when its launcher dies.

    torchelastic starts each process in a new session (torch 2.14.1, `SubprocessHandler._popen`). Processes whose launcher was
    killed would continue training, and hold their GPUs when the launcher is started again.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def renew_rendezvous() -> None:
    """
    Give the process group of a restarted attempt a new store. Call it before anything builds the process group.

    With `accelerate launch --max_restarts` all attempts share the agent's store, in which the next attempt finds the
    addresses of dead processes and cannot connect (torch 2.14.1, `torch.distributed.rendezvous._create_c10d_store`, with
    static and c10d rendezvous). Delete this when a plain `init_process_group` survives a restart.
    """
    if attempt() == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        free_port = probe.getsockname()[1]
    os.environ["MASTER_PORT"] = str(channel().gather("port", free_port)[0])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def locate() -> None:
    """
    Find out which ranks share a machine where the launcher does not tell (`srun`, `mpirun`). Call it on all ranks.

    `LOCAL_RANK` and `LOCAL_WORLD_SIZE`, which accelerate reads, are set if they are missing.
    """
    if is_located():
        return
    connected = channel()
    place = Topology.from_hosts(connected.gather("hosts", socket.gethostname()), topology().rank)
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(place.local_world_size))
    relocate(place)
    connected.topology = place


def check_process_count(known: int) -> None:
    """Raise `ValueError` if `known`, the processes that accelerate knows, are not all of the launch."""
    launched = topology().world_size
    if launched != known:
        raise ValueError(
            f"The launcher started {launched} processes, but accelerate knows {known}: something created its state too early, "
            "without knowing that the launch uses the CPU. Create no PartialState() or Accelerator() before the trainer's "
            "arguments or MultiGPUTrainer.setup(), or pass cpu=True to it."
        )


def close_process_group_at_exit() -> None:
    """
    Destroy the process group when the process ends.

    Otherwise Gloo's threads may still run during the interpreter's shutdown, and abort a run that had succeeded
    ("terminate called without an active exception", once in some hundred launches with torch 2.14.1).
    """

    def close() -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    if topology().world_size > 1:
        atexit.register(close)


def bind_device() -> None:
    """
    Make this rank's GPU the current device, before anything creates a CUDA context on another one.

    Raises:
        RuntimeError: if the launch has more processes on this node than it has visible GPUs.
    """
    import torch

    place, visible = topology(), torch.cuda.device_count()
    if visible == 0 or place.world_size == 1:
        return
    # A scheduler may show each task only its own GPU; processes of one elastic agent all see the same GPUs.
    one_gpu_each = visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if place.local_world_size > visible and not one_gpu_each:
        raise RuntimeError(
            f"{place.local_world_size} processes were started on {socket.gethostname()}, but {visible} GPU(s) are "
            f"visible there, and each process owns one. Launch with --num_processes {visible}, or make more GPUs "
            "visible with CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(0 if one_gpu_each else place.local_rank)
