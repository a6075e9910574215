"""The installation check: its order, and the comparisons on plain numbers."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired

from ...devices.manager import DeviceManager
from ...testing import launching

OK, SKIPPED, FAILED = "ok", "skipped", "failed"
_WORKER = "accelerate_unsloth.commands.test.worker"
_CPU_PROCESSES = 2
_MICRO_STEPS = 2  # of each process in the launch of several
# Relative differences of losses and logits that rounding explains.
_TOLERANCE = {"float32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
_RELOAD_TOLERANCE = {"float32": 1e-3, "bf16": 1e-1, "fp16": 1e-1}


class ProcessFailed(RuntimeError):
    """A started process did not end in order; the message holds the end of its output."""


@dataclass(frozen=True)
class Check:
    """What was checked, as a statement that holds if all is well; how it went; and the numbers."""

    name: str
    status: str  # OK, SKIPPED or FAILED
    detail: str

    def __str__(self) -> str:
        return f"[{self.status}] {self.name}: {self.detail}"


def learns(processes: int, losses: Sequence[float]) -> Check:
    """Check that the loss is a number in every step, and falls."""
    name = f"{processes} process(es) train, and the loss falls"
    falls = all(map(math.isfinite, losses)) and len(losses) > 1 and losses[-1] < losses[0]
    return Check(name, OK if falls else FAILED, " ".join(f"{loss:.4f}" for loss in losses) or "no step was logged")


def same_losses(one: Sequence[float], several: Sequence[float], tolerance: float) -> Check:
    """Check that each step's loss is that of one process."""
    name = "the losses are those of one process"
    if len(one) != len(several):
        return Check(name, FAILED, f"{len(one)} steps on one process, {len(several)} on several")
    differences = [abs(a - b) / abs(a) for a, b in zip(one, several, strict=True)]
    # `all`, because a comparison with NaN is false, and `max` may pass over it.
    close = all(difference <= tolerance for difference in differences)
    detail = f"largest relative difference {max(differences):.1e}, allowed {tolerance:.0e}"
    return Check(name, OK if close else FAILED, detail)


def same_weights(checksums: Sequence[dict[str, int]]) -> Check:
    """Check that all ranks end with the same weights, bit for bit."""
    others = [str(rank) for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    detail = f"rank(s) {', '.join(others)} differ from rank 0" if others else f"{len(checksums)} rank(s), bit for bit"
    return Check("all ranks hold the same weights", FAILED if others else OK, detail)


def right_devices(devices: Sequence[Sequence[str]], on_gpu: bool) -> Check:
    """Check that, rank by rank, the whole model is on the rank's own GPU, or on the CPU."""
    expected = [[f"cuda:{rank}" if on_gpu else "cpu"] for rank in range(len(devices))]
    found = ", ".join(f"rank {rank} on {'+'.join(names)}" for rank, names in enumerate(devices))
    right = [list(names) for names in devices] == expected
    return Check("each rank has the model on its own device", OK if right else FAILED, found)


def reloads(outputs: Mapping[str, Sequence[float]], tolerance: float) -> Check:
    """
    Check that the adapter, loaded by PEFT alone, computes what the trained model did, and not what the base model does.

    `outputs` are logits of one text; `tolerance` is relative to what training changed.
    """
    error = math.dist(outputs["trained"], outputs["reloaded"])
    change = math.dist(outputs["trained"], outputs["base"])
    detail = f"off by {error:.1e}, where training changed {change:.1e}"
    close = change > 0 and error <= tolerance * change
    return Check("the saved adapter loads with plain PEFT and computes the same", OK if close else FAILED, detail)


def run(num_processes: int | None = None, timeout_s: float = 300.0) -> Iterator[Check]:
    """
    Train a tiny model on one process and on several, and compare; yield each check when it is done.

    `num_processes` is by default the number of visible GPUs, or 2 on a CPU. The first launch that fails, or takes longer than
    `timeout_s`, is the last. Raise `ValueError` for more processes than GPUs, or fewer than 1.
    """
    manager = DeviceManager()
    devices = manager.get_available_devices()
    num_processes = _choose_processes(num_processes, len(devices))
    precision = "float32" if not devices else "bf16" if all(device.bf16 for device in devices) else "fp16"
    return _checks(num_processes, bool(devices), precision, manager.notes, timeout_s)


def passed(checks: Iterable[Check]) -> bool:
    """Whether no check failed."""
    return all(done.status != FAILED for done in checks)


def _choose_processes(wanted: int | None, gpus: int) -> int:
    if wanted is None:
        return gpus or _CPU_PROCESSES
    if wanted < 1 or (gpus and wanted > gpus):
        limit = f"{gpus} GPU(s) are visible, and each process owns one" if gpus else "at least one is needed"
        raise ValueError(f"num_processes={wanted} cannot be launched: {limit}. Ask for 1 to {gpus or 'several'}.")
    return wanted


def _checks(num_processes: int, on_gpu: bool, precision: str, notes, timeout_s: float) -> Iterator[Check]:
    where = f"{num_processes} GPU(s)" if on_gpu else "the CPU"
    yield Check("devices", OK, " ".join([f"training on {where} in {precision}.", *notes]))
    with tempfile.TemporaryDirectory(prefix="accelerate_unsloth_") as name:
        folder = Path(name)
        launch = _Launch(folder, on_gpu, precision, _MICRO_STEPS * num_processes, timeout_s)
        try:
            launch.python("-m", "accelerate_unsloth.testing.tiny_model", name)
            yield Check("a tiny model and its data are made", OK, "no downloads")
            yield from _compare(launch, num_processes)
        except ProcessFailed as error:
            yield Check("every process ends in order", FAILED, str(error))


def _compare(launch: "_Launch", num_processes: int) -> Iterator[Check]:
    one = launch.train(1)
    yield learns(1, one[0]["losses"])
    several = one
    if num_processes > 1:
        several = launch.train(num_processes)
        yield learns(num_processes, several[0]["losses"])
        yield same_losses(one[0]["losses"], several[0]["losses"], _TOLERANCE[launch.precision])
        yield same_weights([rank["weights"] for rank in several])
    else:
        yield Check("several processes train as one", SKIPPED, "one process only, so there is nothing to compare")
    yield right_devices([rank["devices"] for rank in several], launch.on_gpu)
    outputs = launch.reload(num_processes) | {"trained": several[0]["logits"]}
    yield reloads(outputs, _RELOAD_TOLERANCE[launch.precision])


@dataclass(frozen=True)
class _Launch:
    """Launches of the worker that all train on the same effective batches."""

    folder: Path
    on_gpu: bool
    precision: str
    effective_batch: int
    timeout_s: float

    def train(self, processes: int) -> list[dict]:
        """Return what each rank wrote."""
        name, accumulation = f"processes{processes}", self.effective_batch // processes
        (self.folder / name).mkdir()
        arguments = ("train", str(self.folder), name, str(accumulation), self.precision)
        self.python(*launching.launcher(processes, self.on_gpu), "-m", _WORKER, *arguments)
        return [json.loads((self.folder / name / f"rank{rank}.json").read_text()) for rank in range(processes)]

    def reload(self, processes: int) -> dict:
        """Return what the adapter of that training computes under plain PEFT."""
        name = f"processes{processes}"
        self.python("-m", _WORKER, "reload", str(self.folder), name)
        return json.loads((self.folder / name / "reloaded.json").read_text())

    def python(self, *words: str) -> None:
        """Run Python in the folder, which all that it leaves is in."""
        compiled, cache = str(self.folder / "unsloth_compiled_cache"), str(self.folder / "cache")
        environment = launching.clean_environment(os.environ, UNSLOTH_COMPILE_LOCATION=compiled, HF_HOME=cache)
        try:
            finished = launching.run_python(list(words), environment, self.folder, self.timeout_s)
        except TimeoutExpired as expired:
            raise ProcessFailed(f"no end after {self.timeout_s:.0f} s\n{_end_of(expired.output)}") from None
        if finished.status:
            raise ProcessFailed(f"ended with status {finished.status}\n{_end_of(finished.output)}")


def _end_of(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-15:])
