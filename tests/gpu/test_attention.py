"""All rows in one call of PyTorch's varlen attention, against the same rows one by one."""

import pytest

from .comparing import BF16_ROUNDING

pytestmark = [pytest.mark.gpu, pytest.mark.launch]


@pytest.mark.cases(one="varlen")
def test_rows_in_one_call_give_the_output_and_gradients_of_rows_one_by_one(outcome):
    found = outcome("one", "varlen")
    if not found.pop("spare"):
        pytest.skip("only PyTorch 2.11 has a varlen attention that Unsloth does not take")
    assert found.pop("restored")
    for window, differences in found.items():
        assert differences.pop("calls") == 1, window
        assert all(difference < BF16_ROUNDING for difference in differences.values()), (window, differences)
