"""When two runs are the same to bfloat16's rounding, and the numbers behind that."""

from pathlib import Path
from statistics import median

import pytest

# Losses, step by step: about three significant digits.
BF16_ROUNDING = 1e-2
# Losses of preferences depend on differences of sums over all tokens of an answer: up to 1.1e-2 on two H200s (DPO, 16 bits).
ROUNDING_OF_PREFERENCES = 3e-2

# Both were set by emulation: SmolLM2-135M in float32, with each layer's outputs and each gradient rounded to bfloat16, LoRA of
# rank 8, 12 to 20 steps of two kinds of data. Neither is a maximum over steps: rounding alone moves the gradient of a few steps
# a lot.
#                          rounding       ranks weighted alike   ranks that do not meet
# median of norms          0.004          0.07 to 0.12           0.14 to 0.55
# change of all weights    0.05 to 0.18   0.28 to 0.65           0.26 to 0.82
GRADIENT_NORMS = 2e-2
CHANGE_OF_WEIGHTS = 0.25


def assert_same_training(one: dict, other: dict, rounding: float = BF16_ROUNDING) -> None:
    """
    Compare what two cases returned.

    Losses hardly show a gradient of the wrong size, because Adam divides by it; gradient norms do.
    """
    assert other["losses"] == pytest.approx(one["losses"], rel=rounding)
    assert difference_of_norms(one, other) < GRADIENT_NORMS


def difference_of_norms(one: dict, other: dict) -> float:
    """Median over the steps, relative to the first case."""
    pairs = zip(one["gradient_norms"], other["gradient_norms"], strict=True)
    return median(abs(a - b) / a for a, b in pairs)


def difference_of_changes(one: Path, other: Path) -> float:
    """How far the changes of all weights in two cases are apart, relative to the length of the first."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "change.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    return float((apart / sum(change.square().sum() for change in first.values())).sqrt())
