"""One line of the checklist, and the comparisons that fill it, on plain numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OK, SKIPPED, FAILED = "ok", "skipped", "failed"


@dataclass(frozen=True)
class Check:
    """
    What was checked, how it went, and the numbers.

    Args:
        name (`str`): A statement that holds if all is well.
        status (`str`): `"ok"`, `"skipped"` or `"failed"`.
        detail (`str`): What was found.
    """

    name: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"[{self.status}] {self.name}: {self.detail}"


def learns(processes: int, losses: Sequence[float]) -> Check:
    """The loss is a number in every step, and falls."""
    name = f"{processes} process(es) train, and the loss falls"
    falls = all(map(math.isfinite, losses)) and len(losses) > 1 and losses[-1] < losses[0]
    return Check(name, OK if falls else FAILED, " ".join(f"{loss:.4f}" for loss in losses) or "no step was logged")


def same_losses(one: Sequence[float], several: Sequence[float], tolerance: float) -> Check:
    """Each step's loss is that of one process."""
    name = "the losses are those of one process"
    if len(one) != len(several):
        return Check(name, FAILED, f"{len(one)} steps on one process, {len(several)} on several")
    differences = [abs(a - b) / abs(a) for a, b in zip(one, several, strict=True)]
    # `all`, because a comparison with NaN is false, and `max` may pass over it.
    close = all(difference <= tolerance for difference in differences)
    detail = f"largest relative difference {max(differences):.1e}, allowed {tolerance:.0e}"
    return Check(name, OK if close else FAILED, detail)


def same_weights(checksums: Sequence[str]) -> Check:
    """All ranks end with the same weights, bit for bit."""
    others = [str(rank) for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    detail = f"rank(s) {', '.join(others)} differ from rank 0" if others else f"{len(checksums)} rank(s), bit for bit"
    return Check("all ranks hold the same weights", FAILED if others else OK, detail)


def right_devices(devices: Sequence[Sequence[str]], on_gpu: bool) -> Check:
    """Rank by rank, the whole model is on the rank's own GPU, or on the CPU."""
    expected = [[f"cuda:{rank}" if on_gpu else "cpu"] for rank in range(len(devices))]
    found = ", ".join(f"rank {rank} on {'+'.join(names)}" for rank, names in enumerate(devices))
    right = [list(names) for names in devices] == expected
    return Check("each rank has the model on its own device", OK if right else FAILED, found)


def reloads(outputs: Mapping[str, Sequence[float]], tolerance: float) -> Check:
    """
    The adapter, loaded by PEFT alone, computes what the trained model did, and not what the base model does.

    Args:
        outputs (`Mapping[str, Sequence[float]]`): Logits of one text: `"trained"`, `"reloaded"` and `"base"`.
        tolerance (`float`): Allowed difference, relative to what training changed.
    """
    error = math.dist(outputs["trained"], outputs["reloaded"])
    change = math.dist(outputs["trained"], outputs["base"])
    detail = f"off by {error:.1e}, where training changed {change:.1e}"
    close = change > 0 and error <= tolerance * change
    return Check("the saved adapter loads with plain PEFT and computes the same", OK if close else FAILED, detail)
