"""From micro-steps to tensors: fillers teach nothing, and what is counted is what the loss sees."""

import pytest
import torch
from datasets import Dataset

from accelerate_unsloth.data.loader import IGNORED, PlannedDataLoader, Slot, count_items, count_tokens
from accelerate_unsloth.data.sampler import EffectiveBatchSampler

IDS = [[1, 2], [3], [4, 5, 6], [7]]


class Rows(list):
    """A data set without `__getitems__`."""


def collate(rows):
    """Pads with 0; the rows have to be plain dictionaries, as collators may ask for."""
    assert all(type(row) is dict for row in rows)
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(value):
        return torch.tensor([row["input_ids"] + [value] * (longest - len(row["input_ids"])) for row in rows])

    return {"input_ids": padded(0), "labels": padded(IGNORED), "shift_labels": padded(IGNORED)}


def sampler(rank=0, in_step=False, samples=4, token_budget=None):
    lengths = [len(ids) for ids in IDS[:samples]]
    made = EffectiveBatchSampler(
        samples, 2, rank, 1, 2, seed=0, strategy="sequential", lengths=lengths, in_step=in_step
    )
    made.token_budget = token_budget
    return made


@pytest.fixture(params=[Rows, Dataset.from_list], ids=["list", "data set"])
def rows(request):
    return request.param([{"input_ids": ids} for ids in IDS])


def test_each_micro_step_has_its_samples_and_their_tensors(rows):
    slots = list(PlannedDataLoader(rows, sampler(rank=1), collate))
    assert [type(slot) for slot in slots] == [Slot, Slot]
    assert [slot.samples for slot in slots] == [[[1]], [[3]]]
    assert [batch["input_ids"].tolist() for slot in slots for batch in slot] == [[[3]], [[7]]]
    assert [batch["labels"].tolist() for slot in slots for batch in slot] == [[[3]], [[7]]]


def test_a_micro_step_may_hold_several_micro_batches(rows):
    cut = EffectiveBatchSampler(4, 1, 0, 4, 1, seed=0, strategy="sequential", lengths=[2, 1, 3, 1])
    cut.token_budget = 4
    (slot,) = PlannedDataLoader(rows, cut, collate)
    assert slot.samples == [[0, 3], [1, 2]] or slot.samples == [[2, 3], [0, 1]]
    assert [batch["input_ids"].tolist() for batch in slot] == [
        collate([{"input_ids": IDS[i]} for i in samples])["input_ids"].tolist() for samples in slot.samples
    ]


def test_a_micro_step_without_work_is_empty(rows):
    slots = list(PlannedDataLoader(rows, sampler(rank=1, samples=3), collate))
    assert [list(slot) for slot in slots[1:]] == [[]]
    assert slots[1].samples == []


def test_a_filler_has_the_tokens_of_its_row_and_no_labels(rows):
    *_, slot = PlannedDataLoader(rows, sampler(rank=1, samples=3, in_step=True), collate)
    assert slot.samples == [[~0]]
    (batch,) = slot
    assert batch["input_ids"].tolist() == [[1, 2]]
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [[IGNORED, IGNORED]]


def test_batches_of_evaluation_are_collated_as_they_are_and_fillers_masked(rows):
    batches = list(PlannedDataLoader(rows, [[0, 2], [~1]], collate))
    assert batches[0]["labels"].tolist() == [[1, 2, IGNORED], [4, 5, 6]]
    assert batches[1]["input_ids"].tolist() == [[3]]
    assert batches[1]["labels"].tolist() == [[IGNORED]]


def test_the_loader_passes_the_epoch_on(rows):
    loader = PlannedDataLoader(rows, sampler(), collate)
    loader.set_epoch(3)
    assert loader.batch_sampler.epoch == 3


LABELS = torch.tensor([[1, 2, IGNORED], [3, IGNORED, 4]])


@pytest.mark.parametrize(
    ("batch", "shifted", "items"),
    [
        ({"labels": LABELS}, True, 2),  # nothing predicts a row's first token
        ({"labels": LABELS}, False, 4),
        ({"shift_labels": LABELS, "labels": LABELS}, True, 4),  # shifted already
        ({"input_ids": LABELS}, True, 2),
    ],
)
def test_what_counts_is_what_the_loss_sees(batch, shifted, items):
    assert count_items(batch, shifted) == items


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": LABELS, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, 5),
        ({"input_ids": LABELS, "attention_mask": None}, 6),
        ({"input_ids": LABELS, "attention_mask": torch.ones(2, 1, 3, 3)}, 6),  # not of tokens, but of pairs
        ({"pixel_values": LABELS}, 0),
    ],
)
def test_padding_is_no_token(batch, tokens):
    assert count_tokens(batch) == tokens
