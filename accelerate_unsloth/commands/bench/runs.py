"""Start a measured fine-tune as a user would, watch its host memory, and make figures of what its ranks wrote down."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import psutil

from ...launch import configs

_PHASES = ("python", "imported", "loaded", "adapters", "trainer", "first step", "trained", "saved")

# By what a policy is called in the decisions that a run writes down.
_VARIABLES = {"checkpointing": "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING"}


@dataclass(frozen=True)
class Run:
    """
    One launch of the benchmark.

    Args:
        name (`str`): How tables call it.
        how (`str`): `"plain"`, `"ours"` or `"trl"`.
        processes (`int`): Number of processes.
        batch (`int`): Samples of a micro-batch, as the arguments say it.
        environment (`dict[str, str]`, *optional*): Options of ours, as environment variables.
        lora (`dict`, *optional*): Further arguments of `get_peft_model`.
        keeps (`tuple[str]`, *optional*): Policies that are to be as the whole of ours chose them; see [`pinned`].
    """

    name: str
    how: str
    processes: int
    batch: int
    environment: dict[str, str] = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """
    What every run of a benchmark trains.

    Args:
        model (`str`): Folder of the model.
        data (`str`): JSON Lines file with a `text` column.
        steps (`int`): Optimizer steps.
        effective_batch (`int`): Samples of an optimizer step.
        max_length (`int`): Longest sample in tokens.
        load_in_4bit (`bool`): Quantize the weights.
        optim (`str`): The Trainer's optimizer.
        cpu (`bool`): Stay on the CPU.
    """

    model: str
    data: str
    steps: int
    effective_batch: int = 64
    max_length: int = 2048
    load_in_4bit: bool = True
    optim: str = "adamw_8bit"
    cpu: bool = False


def pinned(run: Run, results: list[dict]) -> Run:
    """
    A run with the policies that it keeps set to what the whole of ours chose, on as many processes, in `results`.

    Example:

    ```python
    >>> from accelerate_unsloth.commands.bench.runs import Run, pinned
    >>> whole = {"name": "1 x ours", "how": "ours", "processes": 1, "environment": {}}
    >>> whole["decisions"] = {"checkpointing": ["none", "it fits"]}
    >>> pinned(Run("fixed", "ours", 1, 16, keeps=("checkpointing",)), [whole]).environment
    {'ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING': 'none'}
    ```
    """
    done = [r for r in results if r.get("how") == "ours" and "decisions" in r]
    whole = [r for r in done if r["processes"] == run.processes and not r["environment"]]
    chosen = whole[0]["decisions"] if whole else {}
    modes = {_VARIABLES[name]: chosen[name][0] for name in run.keeps if name in chosen}
    settable = {variable: mode for variable, mode in modes.items() if mode != "unchanged"}
    return replace(run, environment=run.environment | settable)


def measure(run: Run, work: Workload, out: Path, timeout_s: int = 3600) -> dict:
    """
    Launch one run and return its figures.

    Args:
        run ([`Run`]): What to start.
        work ([`Workload`]): What it trains.
        out (`Path`): Folder for what it writes; made new.
        timeout_s (`int`, *optional*, defaults to `3600`): When to give it up.

    Returns:
        `dict`: see [`figures`]; with `"error"` and the end of the output if it failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    options = asdict(work) | {"batch": run.batch, "lora": run.lora}
    worker = [
        str(Path(__file__).with_name("worker.py")),
        run.how,
        work.model,
        work.data,
        str(out),
        json.dumps(options),
    ]
    command = [sys.executable]
    if run.processes > 1:
        command += configs.launcher("unsloth_ddp_cpu" if work.cpu else "unsloth_ddp", run.processes)
    environment = os.environ | run.environment
    # Every run starts cold, with a cache of its own for compiled code and tokenised data.
    environment |= {"UNSLOTH_COMPILE_LOCATION": str(out / "compiled"), "HF_DATASETS_CACHE": str(out / "datasets")}
    environment |= {"BENCH_LAUNCHED_S": str(time.time()), "UNSLOTH_DISABLE_STATISTICS": "1"}
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen([*command, *worker], stdout=log, stderr=log, env=environment, cwd=out)
        peak = _PeakOfFamily(process.pid)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            status = process.wait()
        finally:
            host_gib = peak.stop()
    if status != 0:
        return {"name": run.name, "error": status, "output": (out / "log.txt").read_text()[-2000:]}
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(run.processes)]
    return {"name": run.name, **asdict(run), **figures(ranks), "peak_host_gib": host_gib}


def figures(ranks: list[dict]) -> dict:
    """
    What the ranks' clocks say.

    Args:
        ranks (`list[dict]`): What each rank wrote down.

    Returns:
        `dict` with `tokens_per_second` (all ranks, median over the last two thirds of the steps), `end_to_end_s` (from
        the launch to the adapter on disk), `attention` (the library that ran uneven rows), `phases_s` (of the slowest rank each), `imbalance` (most tokens of a rank in a step over the mean, averaged),
        `peak_gib` of each rank and `losses`.
    """
    tokens = [_differences([count for _, count in rank["ends"]]) for rank in ranks]
    ends = [max(rank["ends"][step][0] for rank in ranks) for step in range(len(ranks[0]["ends"]))]
    seconds = _differences(ends)
    steady = range(len(seconds) // 3, len(seconds))
    rates = [sum(rank[step] for rank in tokens) / seconds[step] for step in steady]
    imbalances = [max(r[step] for r in tokens) * len(ranks) / max(1, sum(r[step] for r in tokens)) for step in steady]
    launched_s, before, phases = ranks[0]["phases"]["launched"], None, {}
    for phase in _PHASES:
        at = max(rank["phases"][phase] for rank in ranks)
        phases[phase] = at - (before or launched_s)
        before = at
    return {
        "tokens_per_second": statistics.median(rates) if rates else None,
        "step_s": statistics.median(seconds[step] for step in steady) if rates else None,
        "end_to_end_s": before - launched_s,
        "attention": ranks[0]["attention"],
        "phases_s": phases,
        "imbalance": statistics.mean(imbalances) if imbalances else None,
        "peak_gib": [rank["peak_gib"] for rank in ranks],
        "losses": ranks[0]["losses"],
        "step_seconds": seconds,
        "decisions": ranks[0]["decisions"],
    }


def _differences(values: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


class _PeakOfFamily:
    """Most memory that a process and its children held together, sampled twice a second."""

    def __init__(self, pid: int):
        self._pid, self._peak_bytes, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            with suppress(psutil.Error):  # one of them has just ended
                first = psutil.Process(self._pid)
                family = [first, *first.children(recursive=True)]
                self._peak_bytes = max(self._peak_bytes, sum(p.memory_info().rss for p in family))

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return self._peak_bytes / 2**30
