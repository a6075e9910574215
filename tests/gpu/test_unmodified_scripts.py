"""Unsloth's scripts with one line in front of them, with Unsloth itself, on two GPUs."""

import pytest

from .comparing import BF16_ROUNDING

pytestmark = [pytest.mark.gpu, pytest.mark.launch]


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.cases(two=["explicit", script]), id=script)
        for script in ("recent", "notebook")
    ],
)
def test_a_script_with_one_line_in_front_gives_the_losses_of_the_explicit_imports(script, outcome):
    losses = outcome("two", "explicit")["losses"]
    assert len(losses) == 6
    assert outcome("two", script)["losses"] == pytest.approx(losses, rel=BF16_ROUNDING)


@pytest.mark.cases(one="loaders")
def test_every_loader_of_unsloth_is_replaced_and_put_back(outcome):
    found = outcome("one", "loaders")
    assert len(found) == 4
    assert all(found.values())
