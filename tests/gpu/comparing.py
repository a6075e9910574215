"""When two runs are the same to bfloat16's rounding, and the numbers behind that."""

from pathlib import Path
from statistics import median

import pytest

# Losses, step by step: about three significant digits.
BF16_ROUNDING = 1e-2

# The next two were set by emulation: SmolLM2-135M in float32, with each layer's outputs and each gradient rounded to bfloat16,
# LoRA of rank 8, 20 steps of the data used here. Gradient norms have no bound, because of steps with a handful of tokens.
GRADIENT_NORMS = 2e-2  # median; emulated rounding 0.004, ranks weighted alike 0.07, ranks that do not meet 0.14
CHANGE_OF_WEIGHTS = 0.15  # relative; emulated rounding 0.05, ranks that do not meet 0.26, ranks weighted alike 0.65


def assert_same_training(one: dict, other: dict) -> None:
    """
    Compare what two cases returned.

    Losses hardly show a gradient of the wrong size, because Adam divides by it; gradient norms do.
    """
    assert other["losses"] == pytest.approx(one["losses"], rel=BF16_ROUNDING)
    pairs = zip(one["gradient_norms"], other["gradient_norms"], strict=True)
    assert median(abs(a - b) / a for a, b in pairs) < GRADIENT_NORMS


def difference_of_changes(one: Path, other: Path) -> float:
    """How far the changes of all weights in two cases are apart, relative to the length of the first."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "change.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    return float((apart / sum(change.square().sum() for change in first.values())).sqrt())
