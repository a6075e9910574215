"""Decisions as functions of numbers."""

import pytest

from accelerate_unsloth.policies import gradient_sync


@pytest.mark.parametrize(
    ("requested", "world_size", "trainable", "total", "takes_count", "mode"),
    [
        ("auto", 1, 10**9, 10**9, True, "none"),
        ("overlapped", 1, 10**9, 10**9, True, "none"),
        ("auto", 4, 42_000_000, 8 * 10**9, True, "after_backward"),
        ("auto", 4, 525_000_000, 8 * 10**9, True, "after_backward"),  # modules_to_save=["lm_head"],
        ("auto", 4, 8 * 10**9, 8 * 10**9, True, "overlapped"),
        ("auto", 4, 8 * 10**9, 8 * 10**9, False, "after_backward"),
        ("after_backward", 4, 8 * 10**9, 8 * 10**9, True, "after_backward"),
        ("overlapped", 4, 1000, 2000, True, "overlapped"),
    ],
)
def test_gradient_sync(requested, world_size, trainable, total, takes_count, mode):
    choice = gradient_sync.resolve(requested, world_size, trainable, total, takes_count)
    assert choice.mode == mode
    assert choice.reason
    assert not choice.reason.endswith(".")


def test_overlapped_is_refused_where_it_cannot_be_exact():
    with pytest.raises(ValueError, match="does not take num_items_in_batch"):
        gradient_sync.resolve("overlapped", 2, 1000, 1000, loss_takes_item_count=False)
