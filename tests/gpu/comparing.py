"""When two runs are the same to bfloat16's rounding, and the numbers behind that."""

from pathlib import Path
from statistics import median

import pytest

# Losses, step by step: about three significant digits.
BF16_ROUNDING = 1e-2
# Losses of preferences depend on differences of sums over all tokens of an answer. This is the median over the steps; a single
# one was up to 0.079 apart on two H200s (SmolLM2-135M, DPO, 16 bits). On a CPU, 20 steps of the same case by 1 x 2 accumulation
# and by 2 processes: up to 0.065 and a median of 0.011 in bfloat16, and up to 3.2e-6 in float32.
ROUNDING_OF_PREFERENCES = 3e-2

# Both were set by emulation: SmolLM2-135M in float32, with each layer's outputs and each gradient rounded to bfloat16, LoRA of
# rank 8, 12 to 20 steps of two kinds of data. Neither is a maximum over steps: rounding alone moves the gradient of a few steps
# a lot.
#                          rounding                     ranks weighted alike   ranks that do not meet
# median of norms          0.004, preferences 0.014     0.07 to 0.12           0.14 to 0.55
# change of all weights    0.05 to 0.18                 0.28 to 0.65           0.26 to 0.82
GRADIENT_NORMS = 2e-2
CHANGE_OF_WEIGHTS = 0.25


def assert_same_training(one: dict, other: dict) -> None:
    """
    Compare what two cases of supervised fine-tuning returned.

    Losses hardly show a gradient of the wrong size, because Adam divides by it; gradient norms do.
    """
    assert other["losses"] == pytest.approx(one["losses"], rel=BF16_ROUNDING)
    assert difference(one, other, "gradient_norms") < GRADIENT_NORMS


def assert_same_preferences(one: dict, other: dict) -> None:
    """Compare what two cases of preference training returned."""
    assert difference(one, other, "losses") < ROUNDING_OF_PREFERENCES
    assert difference(one, other, "gradient_norms") < GRADIENT_NORMS


def difference(one: dict, other: dict, name: str) -> float:
    """Median over the steps, relative to the first case."""
    pairs = zip(one[name], other[name], strict=True)
    return median(abs(a - b) / a for a, b in pairs)


def difference_of_changes(one: Path, other: Path) -> float:
    """How far the changes of all weights in two cases are apart, relative to the length of the first."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "change.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    return float((apart / sum(change.square().sum() for change in first.values())).sqrt())
