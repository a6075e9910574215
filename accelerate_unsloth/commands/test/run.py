"""The order of the installation check."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...devices.manager import DeviceManager
from . import check
from .check import FAILED, OK, SKIPPED, Check
from .processes import ProcessFailed, launch_command, run_python

_CPU_PROCESSES = 2
_MICRO_STEPS = 2  # of each process in the launch of several
# Relative differences of losses and logits that rounding explains.
_TOLERANCE = {"float32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
_RELOAD_TOLERANCE = {"float32": 1e-3, "bf16": 1e-1, "fp16": 1e-1}


def run(num_processes: int | None = None, timeout_s: float = 300.0) -> Iterator[Check]:
    """
    Train a tiny model on one process and on several, and compare. Yields each check when it is done.

    Args:
        num_processes (`int`, *optional*):
            Processes of the second launch: by default as many as there are visible GPUs, or 2 on the CPU.
        timeout_s (`float`, *optional*, defaults to `300.0`):
            Longest time of each launch, in seconds.

    Returns:
        `Iterator[Check]`: it ends with the first launch that fails.

    Raises:
        ValueError: for more processes than GPUs, or fewer than 1.

    Example:

    ```python
    >>> from accelerate_unsloth import self_test
    >>> checks = list(self_test.run())
    >>> self_test.passed(checks)
    True
    ```
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
        try:
            run_python(["-m", "accelerate_unsloth.commands.test.tiny", name], folder, timeout_s)
            yield Check("a tiny model and its data are made", OK, "no downloads")
            launch = _Launch(folder, on_gpu, precision, num_processes, timeout_s)
            yield from _compare(launch, num_processes)
        except ProcessFailed as error:
            yield Check("every process ends in order", FAILED, str(error))


def _compare(launch: "_Launch", num_processes: int) -> Iterator[Check]:
    one = launch.train(1)
    yield check.learns(1, one[0]["losses"])
    several = one
    if num_processes > 1:
        several = launch.train(num_processes)
        yield check.learns(num_processes, several[0]["losses"])
        yield check.same_losses(one[0]["losses"], several[0]["losses"], _TOLERANCE[launch.precision])
        yield check.same_weights([rank["weights"] for rank in several])
    else:
        yield Check("several processes train as one", SKIPPED, "one process only, so there is nothing to compare")
    yield check.right_devices([rank["devices"] for rank in several], launch.on_gpu)
    outputs = launch.reload(num_processes) | {"trained": several[0]["logits"]}
    yield check.reloads(outputs, _RELOAD_TOLERANCE[launch.precision])


class _Launch:
    """Launches of the worker that all train on the same effective batches."""

    def __init__(self, folder: Path, on_gpu: bool, precision: str, most_processes: int, timeout_s: float):
        self.folder, self.on_gpu, self.precision, self.timeout_s = folder, on_gpu, precision, timeout_s
        self._effective_batch = _MICRO_STEPS * most_processes

    def train(self, processes: int) -> list[dict]:
        """What each rank wrote."""
        name, accumulation = f"processes{processes}", self._effective_batch // processes
        (self.folder / name).mkdir()
        worker = ["accelerate_unsloth.commands.test.worker", str(self.folder), name, str(accumulation), self.precision]
        run_python([*launch_command(processes, self.on_gpu), *worker], self.folder, self.timeout_s)
        return [json.loads((self.folder / name / f"rank{rank}.json").read_text()) for rank in range(processes)]

    def reload(self, processes: int) -> dict:
        """What the adapter of that training computes under plain PEFT."""
        name = f"processes{processes}"
        words = ["-m", "accelerate_unsloth.commands.test.reload", str(self.folder), name]
        run_python(words, self.folder, self.timeout_s)
        return json.loads((self.folder / name / "reloaded.json").read_text())
