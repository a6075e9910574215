"""From micro-steps of indices to tensors, and the counts of items and tokens."""

import pytest
import torch
from datasets import Dataset

from accelerate_unsloth.data.loader import IGNORED, MicroStep, PlannedDataLoader, count_items, count_tokens
from accelerate_unsloth.data.sampler import EffectiveBatchSampler

IDS = [[1, 2], [3], [4, 5, 6], [7]]


class Rows(list):
    """A dataset without `__getitems__`."""


def collate(rows):
    """Pad with 0; the rows have to be plain dictionaries, as some collators require."""
    assert all(type(row) is dict for row in rows)
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(value):
        return torch.tensor([row["input_ids"] + [value] * (longest - len(row["input_ids"])) for row in rows])

    return {"input_ids": padded(0), "labels": padded(IGNORED), "shift_labels": padded(IGNORED)}


def sampler(rank=0, samples=4, token_budget=None):
    lengths = [len(ids) for ids in IDS[:samples]]
    made = EffectiveBatchSampler(samples, 2, rank, 1, 2, seed=0, strategy="sequential", lengths=lengths)
    made.token_budget = token_budget
    return made


@pytest.fixture(params=[Rows, Dataset.from_list], ids=["list", "data set"])
def rows(request):
    return request.param([{"input_ids": ids} for ids in IDS])


def test_each_micro_step_has_its_samples_and_their_tensors(rows):
    micro_steps = list(PlannedDataLoader(rows, sampler(rank=1), collate))
    assert [type(micro_step) for micro_step in micro_steps] == [MicroStep, MicroStep]
    assert [micro_step.samples for micro_step in micro_steps] == [[[1]], [[3]]]
    assert [batch["input_ids"].tolist() for micro_step in micro_steps for batch in micro_step] == [[[3]], [[7]]]
    assert [batch["labels"].tolist() for micro_step in micro_steps for batch in micro_step] == [[[3]], [[7]]]


def test_a_micro_step_may_hold_several_micro_batches(rows):
    cut = EffectiveBatchSampler(4, 1, 0, 4, 1, seed=0, strategy="sequential", lengths=[2, 1, 3, 1])
    cut.token_budget = 4
    (micro_step,) = PlannedDataLoader(rows, cut, collate)
    assert micro_step.samples == [[0, 3], [1, 2]] or micro_step.samples == [[2, 3], [0, 1]]
    assert [batch["input_ids"].tolist() for batch in micro_step] == [
        collate([{"input_ids": IDS[i]} for i in samples])["input_ids"].tolist() for samples in micro_step.samples
    ]


def test_a_micro_step_without_work_is_empty(rows):
    micro_steps = list(PlannedDataLoader(rows, sampler(rank=1, samples=3), collate))
    assert [list(micro_step) for micro_step in micro_steps[1:]] == [[]]
    assert micro_steps[1].samples == []


def test_evaluation_batches_are_collated_unchanged(rows):
    batches = list(PlannedDataLoader(rows, [[0, 2], [1]], collate))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 2, 0], [4, 5, 6]], [[3]]]


def test_the_loader_sets_the_epoch_of_the_sampler(rows):
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
def test_items_are_the_positions_whose_loss_counts(batch, shifted, items):
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
def test_padding_is_not_counted(batch, tokens):
    assert count_tokens(batch) == tokens
