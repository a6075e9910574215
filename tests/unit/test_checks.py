"""What is said of data before anything is prepared."""

import datasets
import pytest

from accelerate_unsloth.trainers import checks


@pytest.mark.parametrize(
    ("rows", "formatted", "message"),
    [
        ({"text": ["a", None, None]}, False, r"2 of 3 samples have no 'text' \(None\), the first at index 1"),
        ({"text": ["a", None, None]}, True, None),
        ({"text": ["a", None, None], "input_ids": [[1]] * 3}, False, None),
        ({"text": ["a", None, None], "messages": [["b"]] * 3}, False, None),
        ({"prompt": ["a", "b", None], "chosen": ["c"] * 3}, False, r"1 of 3 samples have no 'prompt' \(None\), the first at index 2"),
        ({"note": [None] * 3, "text": ["a"] * 3}, False, None),
        ({"text": []}, False, "The given dataset is empty"),
    ],
)  # fmt: skip
def test_texts_that_are_missing_are_named_where_they_are_read(rows, formatted, message):
    dataset = datasets.Dataset.from_dict(rows)
    if message is None:
        checks.check_rows(dataset, "given", formatted)
    else:
        with pytest.raises(ValueError, match=message):
            checks.check_rows(dataset, "given", formatted)


def test_rows_that_were_selected_count_alone():
    dataset = datasets.Dataset.from_dict({"text": ["a", None, "c", None]})
    checks.check_rows(dataset.select([0, 2]), "given", formatted=False)
    with pytest.raises(ValueError, match=r"1 of 2 samples have no 'text' \(None\), the first at index 1"):
        checks.check_rows(dataset.select([2, 3]), "given", formatted=False)
