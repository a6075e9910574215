"""
Run named cases one after the other in the processes of one launch, so that libraries are imported once.

    run_cases.py PLAN

PLAN is a JSON file, `{"out": folder, "shared": folder, "patience_s": 60, "cases": [{"name": ..., "function":
"module:function", "options": {...}}]}`. `function(case, **options)` returns something JSON-serialisable. Each rank writes
`out/<name>/result<rank>.json` as soon as a case ends: its seconds, and its value or the traceback of its error.

A case that fails on all ranks is followed by the next one. One that fails on some ranks ends the launch, because nobody
knows what the others wait for. The price of one process for many cases: what a case changes in the process for good, the
next one inherits. Compiled code, cached memory and the settings that Unsloth leaves in the environment are cleared.
"""

import gc
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from accelerate_unsloth.launch.channel import PeerFailure, channel
from accelerate_unsloth.launch.topology import topology


@dataclass(frozen=True)
class Case:
    """What a case is given: its folder, and the one of all launches of this session, with `materials` in it."""

    name: str
    out: Path
    shared: Path

    @property
    def rank(self) -> int:
        return topology().rank

    @property
    def on_gpu(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def material(self, name: str) -> str:
        """A model's folder or a data file, see `tests/gpu/materials.py`."""
        return str(self.shared / "materials" / name)


def run(case: Case, function: str, options: dict, patience_s: float) -> None:
    """
    Run one case and write its result.

    Raises:
        RuntimeError: if it did not end alike on all ranks.
    """
    case.out.mkdir(parents=True, exist_ok=True)
    settings, began, outcome = unsloth_settings(), time.perf_counter(), {}
    try:
        module, name = function.split(":")
        outcome["value"] = getattr(import_module(module), name)(case, **options)
        json.dumps(outcome)
    except Exception as error:
        outcome = {"error": traceback.format_exc()}
        if isinstance(error, PeerFailure):  # the launch is ending
            write(case, outcome | {"seconds": time.perf_counter() - began})
            raise
    outcome["left_gib"] = clean_up(settings)
    write(case, outcome | {"seconds": time.perf_counter() - began})
    meet(case.name, "error" in outcome, patience_s)


def write(case: Case, outcome: dict) -> None:
    file = case.out / f"result{case.rank}.json"
    file.with_suffix(".part").write_text(json.dumps(outcome))
    file.with_suffix(".part").rename(file)


def meet(name: str, failed: bool, patience_s: float) -> None:
    """
    Compare how a case ended, and how many messages it sent, over all ranks.

    Args:
        failed (`bool`): On this rank, which then waits no longer than `patience_s` for ranks that may be stuck.

    Raises:
        RuntimeError: if that is not the same on all ranks.
    """
    ended = {"failed": failed, "messages": dict(channel()._calls)}
    if failed:
        by_rank = list(channel().gather_within("case", ended, patience_s).values())
    else:
        by_rank = channel().gather("case", ended)
    if any(other != by_rank[0] for other in by_rank):
        raise RuntimeError(f"The case {name!r} did not end alike on all ranks: {by_rank}.")


def unsloth_settings() -> dict[str, str] | None:
    """What Unsloth has in the environment, which differs between models; `None` before it is imported."""
    if "unsloth" not in sys.modules:
        return None
    return {name: value for name, value in os.environ.items() if name.startswith("UNSLOTH_")}


def clean_up(settings: dict[str, str] | None) -> float:
    """Make the process as new as it gets; the GiB of GPU memory that stay allocated."""
    if settings is not None:
        for name in unsloth_settings().keys() - settings.keys():
            del os.environ[name]
        os.environ.update(settings)
    torch = sys.modules.get("torch")
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or sizes that differ between the models of cases would be taken for dynamic
    gc.collect()
    gc.freeze()  # or each of Unsloth's many collections visits all that earlier cases imported
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    for entry in plan["cases"]:
        if topology().is_main:
            print(f"======== {entry['name']}", flush=True)
        case = Case(entry["name"], Path(plan["out"]) / entry["name"], Path(plan["shared"]))
        run(case, entry["function"], entry["options"], plan["patience_s"])


if __name__ == "__main__":
    main(sys.argv[1])
