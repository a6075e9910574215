"""Balanced assignment as a function of numbers."""

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accelerate_unsloth.data.lengths import count_different, lacks_labels, lengths_of
from accelerate_unsloth.data.packing import (
    RowCost,
    assign_balanced,
    assign_in_sizes,
    assign_longest_first,
    pack_padded,
    split_micro_batches,
)
from accelerate_unsloth.data.sampler import assign_by_number

ROWS = st.lists(st.integers(1, 500), min_size=1, max_size=60)
COSTS = st.sampled_from([RowCost(), RowCost(attention_per_token=4e-5), RowCost(padded=True)])


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([9, 1, 4, 5], 2, [[0, 1], [2, 3]]),
        ([1, 1, 1], 2, [[0, 2], [1]]),
        ([7], 3, [[0], [], []]),
    ],
)
def test_the_costliest_sample_goes_to_the_cheapest_part(costs, parts, expected):
    assert assign_longest_first(costs, parts) == expected


@pytest.mark.parametrize(
    ("cost", "lengths", "tokens"),
    [
        (RowCost(), [3, 5], 8),
        (RowCost(padded=True), [3, 5], 10),
        (RowCost(padded=True), [], 0),
        (RowCost(), [], 0),
    ],
)
def test_padding_counts_as_tokens_of_a_micro_batch(cost, lengths, tokens):
    assert cost.tokens(lengths) == tokens


def test_attention_costs_the_square_of_a_length():
    assert [RowCost(attention_per_token=0.5).of(length) for length in (0, 1, 4)] == [0, 1.5, 12]


PADDED, SQUARE = RowCost(padded=True), RowCost(attention_per_token=1.0)


@pytest.mark.parametrize(
    ("lengths", "cost", "budget", "expected"),
    [
        ([5, 5, 5], RowCost(), 10, [[10, 12], [11]]),
        ([5, 5], RowCost(), 10, [[10, 11]]),  # just full
        ([6, 6, 6, 1, 1], RowCost(), 10, [[10, 13], [11, 14], [12]]),  # one more than by the sum
        ([0], RowCost(), 10, [[10]]),
        ([6, 4, 3, 3], RowCost(), 9, [[10, 13], [11, 12]]),
        ([6, 4, 3, 3], SQUARE, 10, [[10], [11, 12, 13]]),
        ([1, 9, 1], PADDED, 9, [[11], [10, 12]]),
        ([1, 9, 1], PADDED, 27, [[11, 10, 12]]),
        ([4, 4], PADDED, 8, [[10, 11]]),  # just full
        ([8, 3, 2, 2], PADDED, 8, [[10], [11, 12], [13]]),
        ([7, 6, 1], PADDED, 19, [[11, 12], [10]]),  # one more than by the sum, not two
    ],
)
def test_a_share_is_split_within_the_budget(lengths, cost, budget, expected):
    assert split_micro_batches(range(10, 10 + len(lengths)), lengths, cost, budget) == expected


@given(ROWS, st.integers(1, 4), st.integers(1, 5), COSTS)
@settings(max_examples=200, deadline=None)
def test_fixed_sizes_are_kept_and_nothing_is_lost(lengths, world_size, micro_batch, cost):
    samples = list(range(len(lengths)))
    accumulation = -(-len(samples) // (world_size * micro_batch))
    rows = assign_by_number(samples, world_size, accumulation, micro_batch)
    sizes = [[len(row[rank]) for row in rows if row[rank]] for rank in range(world_size)]
    ranks = assign_in_sizes(samples, lengths, sizes, cost)
    assert [sorted(map(len, batches)) for batches in ranks] == [sorted(of_rank) for of_rank in sizes]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == samples


@pytest.mark.parametrize("cost", [RowCost(), PADDED])
def test_fixed_sizes_are_balanced(cost):
    """60 rows of 16 tokens and 4 of 2,048: two ranks of two micro-batches of 16 rows each."""
    lengths = [16] * 60 + [2048] * 4
    ranks = assign_in_sizes(range(64), lengths, [[16, 16], [16, 16]], cost)
    assert [[len(batch) for batch in batches] for batches in ranks] == [[16, 16], [16, 16]]
    loads = [sum(cost.tokens([lengths[i] for i in batch]) for batch in batches) for batches in ranks]
    assert loads == ([4576, 4576] if cost is not PADDED else [2048 * 16 + 256, 512])


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        # Micro-batches of 60, 60, 50, 40 and 10 tokens, from the costliest on to the rank with the fewest.
        ([60, 50, 40, 30, 20, 10], 60, [[[0], [1]], [[3, 4], [2], [5]]]),
        ([2, 2, 2, 2], 4, [[[0, 1]], [[2, 3]]]),  # no more of them than the budget requires
    ],
)
def test_padded_micro_batches_are_few_and_balanced(lengths, budget, expected):
    assert assign_balanced(range(len(lengths)), lengths, 2, PADDED, token_budget=budget) == expected


def test_more_padded_micro_batches_are_formed_where_that_saves_time():
    """8 rows of 2,000 tokens beside 8 of 8,000: padded to these they would cost four times as much."""
    lengths = [8000] * 8 + [2000] * 8
    assert assign_balanced(range(16), lengths, 1, PADDED, token_budget=128_000) == [
        [list(range(8)), list(range(8, 16))]
    ]
    short = [20] * 8 + [10] * 8  # takes as long as its kernel launches, however it is padded
    assert assign_balanced(range(16), short, 1, PADDED, token_budget=128_000) == [[list(range(16))]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
@example([1, 1, 1, 1], 2)
@settings(max_examples=200, deadline=None)
def test_the_costliest_padded_micro_batch_costs_as_little_as_possible(lengths, parts):
    groups = pack_padded(lengths, parts)
    assert len(groups) <= parts
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    ordered = sorted(lengths, reverse=True)
    # Every way to split the sorted rows into neighbors.
    ways = [
        max(PADDED.tokens(ordered[start:end]) for start, end in pairwise([0, *edges, len(ordered)]))
        for edges in combinations_with_replacement(range(len(ordered) + 1), parts - 1)
    ]
    assert max(PADDED.tokens([lengths[i] for i in group]) for group in groups) == min(ways)


def test_rows_without_tokens_are_packed_like_others():
    assert pack_padded([0, 0, 0], 1) == [[0, 1, 2]]
    assert len(pack_padded([0, 2, 0, 0], 2)) == 2


@given(ROWS, st.integers(1, 6), COSTS, st.integers(500, 2000))
@settings(max_examples=200, deadline=None)
def test_a_budget_is_kept_by_all_micro_batches(lengths, world_size, cost, budget):
    ranks = assign_balanced(list(range(len(lengths))), lengths, world_size, cost, token_budget=budget)
    assert len(ranks) == world_size
    assert all(all(batches) for batches in ranks)  # none is empty
    assert all(cost.tokens([lengths[i] for i in batch]) <= budget for batches in ranks for batch in batches)
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(len(lengths)))


@given(ROWS, st.integers(500, 2000))
@settings(max_examples=200, deadline=None)
def test_a_share_is_split_into_few_micro_batches(lengths, budget):
    batches = split_micro_batches(list(range(len(lengths))), lengths, RowCost(), token_budget=budget)
    assert len(batches) <= 2 * -(-sum(lengths) // budget)  # no worse than any first-fit packing


@pytest.mark.parametrize("cost", [RowCost(), RowCost(padded=True)])
def test_a_sample_above_the_budget_is_named(cost):
    with pytest.raises(ValueError, match="Sample 8 has 90 tokens, and a micro-batch may hold 80"):
        assign_balanced([7, 8], [10, 90], 2, cost, token_budget=80)


def test_ranks_are_balanced_on_the_lengths_of_the_benchmark():
    """16 samples per rank, 4 ranks: in each of 1,000 steps the slowest takes at most 1.02 times the mean."""
    generator, cost = np.random.default_rng(0), RowCost(attention_per_token=3.8e-5)
    for _ in range(1000):
        lengths = np.clip(generator.lognormal(6.9, 1.0, 64) / 3.2, 1, 2048).astype(int).tolist()
        ranks = assign_balanced(list(range(64)), lengths, 4, cost, token_budget=8192)
        loads = [sum(cost.of(lengths[i]) for batch in batches for i in batch) for batches in ranks]
        assert max(loads) / (sum(loads) / 4) <= 1.02


def test_padded_rows_of_similar_length_share_a_micro_batch():
    ranks = assign_balanced(list(range(6)), [100, 10, 90, 9, 11, 12], 2, RowCost(padded=True), token_budget=200)
    assert sorted(sorted(batch) for batches in ranks for batch in batches) == [[0, 2], [1, 3, 4, 5]]


def test_lengths_are_those_of_the_rows_also_after_a_selection(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 1, 0, 5)]})
    assert lengths_of(rows).tolist() == [3, 1, 0, 5]
    assert lengths_of(rows.select([3, 0])).tolist() == [5, 3]
    assert lengths_of(rows.select([])).tolist() == []
    assert lengths_of(rows.remove_columns("input_ids")) is None
    assert lengths_of([{"input_ids": [1]}]) is None
    assert lengths_of(rows.to_iterable_dataset()) is None


def test_rows_without_a_label_behind_the_prompt_are_found_also_after_a_selection():
    rows = Dataset.from_dict({"labels": [[-100, 5], [-100, -100], [7], [-100, 5, 6], []]})
    assert lacks_labels(rows, "labels").tolist() == [False, True, True, False, True]
    assert lacks_labels(rows.select([3, 1]), "labels").tolist() == [False, True]


def test_different_lengths_are_those_of_documents_if_rows_are_packed():
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in (6, 6, 4)], "seq_lengths": [[1, 5], [3, 3], [4]]})
    lengths = lengths_of(rows)
    assert count_different(rows, lengths) == 4
    assert count_different(rows.remove_columns("seq_lengths"), lengths) == 2
    assert count_different(rows.select([1]), lengths[1:2]) == 1
    assert count_different(rows, None) == 0


def test_lengths_of_rows_in_files_are_counted_in_their_order(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 1, 5)]})
    rows.save_to_disk(tmp_path)
    stored = Dataset.load_from_disk(tmp_path)
    assert lengths_of(stored).dtype == np.int32
    assert lengths_of(stored.select([2, 1, 0])).tolist() == [5, 1, 3]
    assert lengths_of(stored.filter(lambda row: len(row["input_ids"]) > 1)).tolist() == [3, 5]
    assert lengths_of(stored.map(lambda row: {"input_ids": row["input_ids"] * 2}, num_proc=2)).tolist() == [6, 2, 10]


def test_lengths_are_not_read_through_a_transform():
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2]]})
    rows.set_transform(lambda batch: pytest.fail("a transform was called"))
    assert lengths_of(rows).tolist() == [1, 2]
