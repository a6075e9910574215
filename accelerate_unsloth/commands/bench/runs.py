"""Which runs a benchmark consists of, how one is started and watched, and the figures of what its ranks wrote down."""

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import psutil

from ...reporting.readings import imbalance
from ...testing import launching

_PHASES = ("python", "imported", "loaded", "adapters", "trainer", "first step", "trained", "saved")

# Our choices taken back one by one: an option of UnslothPlugin as an environment variable, and the choices that would
# follow from it, which stay as the whole of ours made them.
ABLATIONS = {
    "without our attention kernel": ({"ACCELERATE_UNSLOTH_ATTENTION": "unchanged"}, ()),
    "without balanced ranks": ({"ACCELERATE_UNSLOTH_BALANCE_TOKENS": "0"}, ()),
    "without planned micro-batches": ({"ACCELERATE_UNSLOTH_MICRO_BATCH": "fixed"}, ("checkpointing",)),
    "with Unsloth's checkpointing": ({"ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING": "unsloth"}, ()),
}

# Which layers recompute, beside those that we choose: a value of the plugin's `gradient_checkpointing`.
RECOMPUTATION = {"recomputing all layers": "unsloth", "recomputing none": "none"}

_EXCEPTION = re.compile(r"(?:\[rank\d+\]: *)?([\w.]*(?:Error|Exception|Interrupt)\b.*)")
_OF_LAUNCHER = re.compile(r"[\w.]*(?:ChildFailedError|CalledProcessError)")

# By what a policy is called in the decisions that a run writes down.
_VARIABLES = {"checkpointing": "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING"}


@dataclass(frozen=True)
class Run:
    """One launch of the benchmark."""

    name: str
    how: str  # "plain", "ours" or "trl"
    processes: int
    batch: int  # samples of a micro-batch, as the arguments say it
    environment: dict[str, str] = field(default_factory=dict)  # our options
    lora: dict = field(default_factory=dict)  # further arguments of `get_peft_model`
    keeps: tuple[str, ...] = ()  # policies that are to be as the whole of ours chose them, see `pinned`
    gpu_gib: float | None = None  # memory that PyTorch may use of each GPU


@dataclass(frozen=True)
class Workload:
    """What every run of a benchmark trains: a model's folder on a JSON Lines file with the columns of its trainer."""

    model: str
    data: str
    steps: int
    effective_batch: int = 64
    max_length: int = 2048
    load_in_4bit: bool = True
    optim: str = "adamw_8bit"
    cpu: bool = False
    trainer: str = "sft"  # or "dpo", "kto", "orpo"


def plan(
    processes: list[int], plain_batches: list[int], batch: int, with_trl: bool = True, ablation: bool = True
) -> list[Run]:
    """
    Return the runs of a comparison: plain Unsloth at each of its per-device batches, TRL at the smallest, because it keeps
    more in memory, ours, and on the most processes ours with each choice taken back.

    Example:

    ```python
    >>> from accelerate_unsloth.commands.bench.runs import plan
    >>> [run.name for run in plan([2], [4, 16], batch=16, with_trl=False, ablation=False)]
    ['2 x plain, batch 4', '2 x plain, batch 16', '2 x ours']
    ```
    """
    runs, smallest = [], min([*plain_batches, batch])
    for count in processes:
        runs += [Run(f"{count} x plain, batch {size}", "plain", count, size) for size in plain_batches]
        if with_trl:
            runs.append(Run(f"{count} x TRL + PEFT, batch {smallest}", "trl", count, smallest))
        runs.append(Run(f"{count} x ours", "ours", count, batch))
    if ablation:
        most = max(processes)
        for what, (variables, keeps) in ABLATIONS.items():
            runs.append(Run(f"{most} x ours {what}", "ours", most, batch, variables, keeps=keeps))
    return runs


def limited(runs: list[Run], gpu_gib: float) -> list[Run]:
    """Return runs on GPUs of which PyTorch may use so much, ours also with all layers and no layer recomputing."""
    most = max(run.processes for run in runs)
    whole = next(run for run in runs if run.how == "ours" and run.processes == most)
    variants = [
        replace(whole, name=f"{whole.name} {what}", environment={_VARIABLES["checkpointing"]: mode})
        for what, mode in RECOMPUTATION.items()
    ]
    return [replace(run, name=f"{run.name}, {gpu_gib:g} GiB", gpu_gib=gpu_gib) for run in [*runs, *variants]]


def pinned(run: Run, results: list[dict]) -> Run:
    """Set the policies that a run keeps to what the whole of ours, on as many processes, chose in `results`."""
    done = [r for r in results if r.get("how") == "ours" and "decisions" in r]
    whole = [r for r in done if r["processes"] == run.processes and not r["environment"]]
    chosen = whole[0]["decisions"] if whole else {}
    modes = {_VARIABLES[name]: chosen[name][0] for name in run.keeps if name in chosen}
    settable = {variable: mode for variable, mode in modes.items() if mode != "unchanged"}
    return replace(run, environment=run.environment | settable)


def measure(run: Run, work: Workload, out: Path, timeout_s: int = 3600) -> dict:
    """
    Launch one run in the new folder `out`.

    Returns:
        `dict`: see [`figures`]; with the status as `"error"`, its `"reason"` and the end of the output if it failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    options = asdict(work) | {"batch": run.batch, "lora": run.lora, "gpu_gib": run.gpu_gib}
    worker = [
        str(Path(__file__).with_name("worker.py")),
        run.how,
        work.model,
        work.data,
        str(out),
        json.dumps(options),
    ]
    launcher = launching.launcher(run.processes, on_gpu=not work.cpu) if run.processes > 1 else []
    environment = os.environ | run.environment
    # Every run starts cold, with a cache of its own for compiled code and tokenised data.
    environment |= {"UNSLOTH_COMPILE_LOCATION": str(out / "compiled"), "HF_DATASETS_CACHE": str(out / "datasets")}
    environment |= {"BENCH_LAUNCHED_S": str(time.time()), "UNSLOTH_DISABLE_STATISTICS": "1"}
    with (out / "log.txt").open("w") as log:
        process = launching.start([sys.executable, *launcher, *worker], environment, out, output=log)
        with _peak_of_family(process.pid) as peak:
            ended = _ends_within(process, timeout_s)
    result = asdict(run) | {"effective_batch": work.effective_batch}
    if process.returncode != 0:
        output = (out / "log.txt").read_text(errors="replace")
        reason = last_error(output) if ended else f"no end after {timeout_s} s"
        return result | {"error": process.returncode, "reason": reason, "output": output[-2000:]}
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(run.processes)]
    return result | figures(ranks) | {"peak_host_gib": max(peak) / 2**30}


def _ends_within(process: subprocess.Popen, timeout_s: int) -> bool:
    try:
        launching.finish(process, timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def last_error(output: str) -> str:
    """
    Return the last line that names an exception, other than a launcher's; the last line if there is none.

    Example:

    ```python
    >>> from accelerate_unsloth.commands.bench.runs import last_error
    >>> last_error("Traceback:\\n  line 3\\n[rank1]: ValueError: no data\\nx.errors.ChildFailedError: \\nended")
    'ValueError: no data'
    ```
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = [match[1] for line in lines if (match := _EXCEPTION.match(line)) and not _OF_LAUNCHER.match(match[1])]
    return (found or lines or ["no output"])[-1]


def figures(ranks: list[dict]) -> dict:
    """
    Compute what the ranks' clocks say.

    Returns:
        `dict` with `tokens_per_second` (all ranks, median over the last two thirds of the steps), `end_to_end_s` (from the
        launch to the adapter on disk), `phases_s` (of the slowest rank each), `imbalance` (most tokens of a rank in a step
        over the mean, averaged), and what the ranks wrote down themselves.
    """
    tokens = [_differences([count for _, count in rank["ends"]]) for rank in ranks]
    ends = [max(rank["ends"][step][0] for rank in ranks) for step in range(len(ranks[0]["ends"]))]
    seconds = _differences(ends)
    steady = range(len(seconds) // 3, len(seconds))
    rates = [sum(rank[step] for rank in tokens) / seconds[step] for step in steady]
    imbalances = [imbalance([rank[step] for rank in tokens]) for step in steady]
    at = {phase: max(rank["phases"][phase] for rank in ranks) for phase in _PHASES}
    starts = [ranks[0]["phases"]["launched"], *at.values()]
    return {
        "tokens_per_second": statistics.median(rates) if rates else None,
        "step_s": statistics.median(seconds[step] for step in steady) if rates else None,
        "end_to_end_s": starts[-1] - starts[0],
        "attention": ranks[0]["attention"],
        "phases_s": dict(zip(_PHASES, _differences(starts), strict=True)),
        "imbalance": statistics.mean(imbalances) if imbalances else None,
        "peak_gib": [rank["peak_gib"] for rank in ranks],
        "losses": ranks[0]["losses"],
        "step_seconds": seconds,
        "decisions": ranks[0]["decisions"],
    }


def _differences(values: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


@contextmanager
def _peak_of_family(pid: int) -> Iterator[list[int]]:
    """Sample the bytes that a process and its children hold together, twice a second."""
    samples, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            with suppress(psutil.Error):  # one of them has just ended
                first = psutil.Process(pid)
                samples.append(sum(p.memory_info().rss for p in [first, *first.children(recursive=True)]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
