"""
Activations are kept where they fit, also for scripts that ask for Unsloth's checkpointing, and nothing runs out of memory
for it: not the probe, an evaluation or a generation in the middle, nor beside other processes on the GPU.
"""

import pytest

from .comparing import assert_same_training

pytestmark = [pytest.mark.gpu, pytest.mark.launch]
# Keeping activations on one process takes less than this, whatever is beside it.
ENOUGH_GIB = 70


def with_reference(*names):
    """Parameters for one case each, beside the one that recomputes."""
    marks = {name: pytest.mark.cases(margin=["recomputing", name]) for name in names}
    return [pytest.param(name, marks=mark, id=name) for name, mark in marks.items()]


@pytest.mark.parametrize(
    "name", with_reference("auto", "busy", "fraction", "capped", "neighbour", "growing-neighbour")
)
def test_a_run_ends_in_order_with_the_losses_of_recomputation(name, outcome):
    reference, found = outcome("margin", "recomputing"), outcome("margin", name)
    assert reference["checkpointing"] == "unsloth"
    assert len(found["losses"]) == 4
    assert_same_training(reference, found)
    assert found["recomputes_at_end"] == (found["checkpointing"] != "none")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.cases(margin=name), id=name) for name in ("auto", "busy")]
)
def test_activations_are_kept_where_they_fit_within_the_fraction(name, outcome):
    found = outcome("margin", name)
    if found["total_gib"] < ENOUGH_GIB:
        pytest.skip(f"a GPU of {found['total_gib']:.0f} GiB may have to recompute")
    assert found["checkpointing"] == "none", found["checkpointing_reason"]
    assert found["peak_gib"] <= 0.9 * found["total_gib"]


@pytest.mark.cases(margin="fraction")
def test_a_small_fraction_is_obeyed(outcome):
    found = outcome("margin", "fraction")
    assert found["peak_gib"] <= 0.15 * found["total_gib"]


@pytest.mark.cases(margin="busy")
def test_evaluation_and_generation_take_place_in_the_middle(outcome):
    found = outcome("margin", "busy")
    assert len(found["eval_losses"]) == 2
    assert found["generated"] == 64


@pytest.mark.cases(margin="capped")
def test_recomputation_takes_over_where_the_longest_sample_fits_with_it_alone(outcome):
    assert outcome("margin", "capped")["checkpointing"] == "unsloth"


@pytest.mark.cases(margin="growing-neighbour")
def test_memory_that_is_taken_during_training_makes_micro_batches_smaller(outcome):
    assert "ran out of memory at step" in outcome("margin", "growing-neighbour")["micro_batch_reason"]
