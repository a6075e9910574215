"""
One launch for all cases of a kind: `cases/__init__.py` names them, `tests/workers/run_cases.py` runs them.

A launch is started when the first test asks for one of its cases, with the cases of the selected tests alone. Should it end
before its last case, the one it was in has failed, and another launch runs those that were left: one bad case costs a
start, not the results of others. With two GPUs `one` and `margin` run at the same time, one GPU each.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate_unsloth.launch import configs
from accelerate_unsloth.testing.launching import end_all

from ..launching import WORKERS, start
from . import cases
from .materials import Materials

# Of all launches of a name together. Longer means that something hangs.
TIMEOUT_S = float(os.environ.get("LAUNCH_TIMEOUT_S", 400))
# A rank that failed alone waits so long for the others, which may still compile.
PATIENCE_S = 60


def run_cases(entries: list[dict], out: Path, shared: Path, processes: int, launch: Callable[[Path], str]) -> None:
    """
    Run cases until each has a result of each rank.

    Args:
        entries (`list[dict]`): As `run_cases.py` takes them.
        launch (`Callable`): Runs it with a plan, and returns what was printed.
    """
    out.mkdir(parents=True, exist_ok=True)
    left = entries
    while left:
        plan = out / "plan.json"
        plan.write_text(json.dumps({"out": str(out), "shared": str(shared), "patience_s": PATIENCE_S, "cases": left}))
        output = launch(plan)
        begun = [entry for entry in left if (out / entry["name"]).is_dir()]
        for entry in begun or left:  # without a single beginning the next launch would do no better
            fill_in(out / entry["name"], processes, output)
        left = [entry for entry in left if not (out / entry["name"]).is_dir()]


def fill_in(folder: Path, processes: int, output: str) -> None:
    """Write what ranks have not written because the launch ended in this case."""
    folder.mkdir(exist_ok=True)
    for file in (folder / f"result{rank}.json" for rank in range(processes)):
        if not file.exists():
            error = f"The launch ended before this case did:\n{output[-6000:]}"
            file.write_text(json.dumps({"seconds": 0.0, "error": error}))


class Suite:
    """
    The launches of one test session.

    Args:
        folder (`Path`): For all that they write.
        wanted (`dict[str, list[str]]`): The cases of the selected tests, by launch.
        gpus (`list[str]`): Numbers of up to two GPUs.
        config (`str`, *optional*, defaults to `"unsloth_ddp"`): Of several processes.
    """

    def __init__(self, folder: Path, wanted: dict[str, list[str]], gpus: list[str], config: str = "unsloth_ddp"):
        self.folder, self.wanted, self.seconds, self._config = folder, wanted, {}, config
        self._running, self._is_stopped = [], False
        self.notes = []  # measured by tests, shown at the end
        last = ["one", "margin"]
        phases = [["two"], last] if len(gpus) > 1 else [[name] for name in last]
        self._phases = [[name for name in phase if wanted.get(name)] for phase in phases]
        self._gpus = {"two": gpus, "one": gpus[:1], "margin": gpus[-1:]}
        needed = set().union(*(cases.materials_of(name, names) for name, names in wanted.items()))
        self._materials = Materials(folder / "materials", needed)

    def outcome(self, launch: str, case: str, rank: int = 0):
        """What a case returned on a rank; an error of any rank fails the test."""
        assert case in self.wanted.get(launch, ()), f"this test is not marked with cases({launch}={case!r})"
        while not self._is_done(launch):
            self._run_next_phase()
        ranks = range(cases.PROCESSES[launch])
        results = [json.loads((self.folder / launch / case / f"result{rank}.json").read_text()) for rank in ranks]
        errors = [f"rank {rank}: {result['error']}" for rank, result in enumerate(results) if "error" in result]
        assert not errors, "\n".join(errors)
        return results[rank]["value"]

    def times(self) -> list[str]:
        """One line a case, as far as there are results."""
        lines = [f"{name:40} {seconds:6.1f} s" for name, seconds in self.seconds.items()]
        for launch, names in self.wanted.items():
            for name in (name for name in cases.CASES[launch] if name in names):
                file = self.folder / launch / name / "result0.json"
                if file.exists():
                    result = json.loads(file.read_text())
                    left = f", {result.get('left_gib', 0):.2f} GiB left behind" if result.get("left_gib") else ""
                    failed = ", failed" if "error" in result else ""
                    lines.append(f"  {launch + '/' + name:38} {result['seconds']:6.1f} s{left}{failed}")
        return lines

    def close(self) -> None:
        self._materials.close()

    def _is_done(self, launch: str) -> bool:
        return not any(launch in phase for phase in self._phases)

    def _run_next_phase(self) -> None:
        names = self._phases[0]
        for name in names:
            self._materials.wait_for(cases.materials_of(name, self.wanted[name]))
        with ThreadPoolExecutor() as pool:
            try:
                list(pool.map(self._run, names))
            except BaseException:  # Ctrl-C: the pool would wait for the launches
                self._is_stopped = True
                for process in self._running:
                    end_all(process)
                raise
        self._phases.pop(0)

    def _run(self, name: str) -> None:
        began, out, processes = time.monotonic(), self.folder / name, cases.PROCESSES[name]
        entries = cases.entries_of(name, self.wanted[name])
        run_cases(entries, out, self.folder, processes, lambda plan: self._launch(name, plan, began + TIMEOUT_S))
        self.seconds[f"launch of {name}"] = time.monotonic() - began

    def _launch(self, name: str, plan: Path, deadline: float) -> str:
        """Run `run_cases.py` on the GPUs of this launch, with its output in a file, which a time-out leaves."""
        if self._is_stopped:
            return "stopped"
        processes, log = cases.PROCESSES[name], plan.with_name("output.txt")
        launcher = configs.launcher(self._config, processes) if processes > 1 else []
        environment = {
            "ACCELERATE_UNSLOTH_REPORT": "0",
            "ACCELERATE_UNSLOTH_WATCHDOG_TIMEOUT_S": "150",
            "CUDA_VISIBLE_DEVICES": ",".join(self._gpus[name]),
            "HF_HOME": str(plan.with_name("cache")),
            "UNSLOTH_COMPILE_LOCATION": str(plan.with_name("compiled")),
        }
        command = [sys.executable, *launcher, str(WORKERS / "run_cases.py"), str(plan)]
        with log.open("a") as output:
            before = log.stat().st_size
            process = start(command, environment, output=output)
            self._running.append(process)
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                output.write(f"\nno end after {TIMEOUT_S:.0f} s\n")
            finally:
                end_all(process)
        return log.read_text(errors="replace")[before:]


def visible_gpus(count: int) -> list[str]:
    """Those named in GPUS, or up to two of all."""
    named = os.environ.get("GPUS")
    return named.split(",") if named else [str(index) for index in range(min(2, count))]
