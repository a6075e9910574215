"""Assignment of samples as a function of numbers, without processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_unsloth.data.loader import count_tokens
from accelerate_unsloth.data.packing import RowCost
from accelerate_unsloth.data.sampler import EffectiveBatchSampler, EvaluationSampler, assign_by_number, epoch_order

LAUNCH = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))  # processes, accumulation, micro-batch


@pytest.mark.parametrize(
    ("samples", "world_size", "accumulation", "micro_batch", "expected"),
    [
        # micro-step -> rank -> samples; a full batch is split in order
        (8, 2, 2, 2, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (4, 1, 4, 1, [[[0]], [[1]], [[2]], [[3]]]),
        (4, 4, 1, 1, [[[0], [1], [2], [3]]]),
        # an incomplete one is spread over the ranks, in as few micro-steps as hold it
        (1, 2, 2, 2, [[[0], []], [[], []]]),
        (3, 2, 2, 2, [[[0, 1], [2]], [[], []]]),
        (5, 2, 2, 2, [[[0, 1], [2]], [[3], [4]]]),
        (2, 4, 1, 2, [[[0], [1], [], []]]),
    ],
)
def test_a_batch_is_assigned_evenly_and_in_order(samples, world_size, accumulation, micro_batch, expected):
    assert assign_by_number(list(range(samples)), world_size, accumulation, micro_batch) == expected


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": torch.ones(2, 3)}, 6),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}, 4),
        ({"input_ids": torch.ones(1, 8), "packed_seq_lengths": torch.tensor([2, 3])}, 5),  # padded to a multiple of 8
    ],
)
def test_padding_does_not_count_as_tokens(batch, tokens):
    assert count_tokens(batch) == tokens


def samplers(num_samples, launch, **options):
    world_size, accumulation, micro_batch = launch
    return [
        EffectiveBatchSampler(num_samples, world_size, rank, micro_batch, accumulation, seed=7, **options)
        for rank in range(world_size)
    ]


def effective_batches(ranks):
    """Return the set of samples of each optimizer step, over all ranks."""
    accumulation = ranks[0].accumulation
    streams = [list(sampler) for sampler in ranks]
    steps = len(streams[0]) // accumulation
    return [
        sorted(
            index
            for stream in streams
            for micro_step in stream[step * accumulation : (step + 1) * accumulation]
            for micro_batch in micro_step
            for index in micro_batch
        )
        for step in range(steps)
    ]


LENGTHS = [(97 * i) % 61 + 1 for i in range(90)]

# Ways to assign samples, none of which may change the effective batches.
WAYS = {
    "by number": {},
    "by tokens": {"balance": True},
    "padded": {"balance": True, "cost": RowCost(padded=True)},
    "to a budget": {"balance": True, "token_budget": 64},
    "padded, to a budget": {"balance": True, "cost": RowCost(padded=True), "token_budget": 64},
    "by number, to a budget": {"token_budget": 64},
    "padded, by number, to a budget": {"cost": RowCost(padded=True), "token_budget": 64},
}


def ways(num_samples, launch, way):
    options = dict(WAYS[way])
    budget = options.pop("token_budget", None)
    ranks = samplers(num_samples, launch, lengths=LENGTHS[:num_samples], **options)
    for sampler in ranks:
        sampler.token_budget = budget
    return ranks


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(1, 90), LAUNCH)
@settings(max_examples=60, deadline=None)
def test_the_effective_batches_are_those_of_one_process_however_they_are_assigned(way, num_samples, launch):
    world_size, accumulation, micro_batch = launch
    together = effective_batches(samplers(num_samples, (1, 1, world_size * accumulation * micro_batch)))
    assert effective_batches(ways(num_samples, launch, way)) == together
    assert sorted(index for batch in together for index in batch) == list(range(num_samples))


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(1, 90), LAUNCH)
@settings(max_examples=60, deadline=None)
def test_every_rank_yields_every_micro_step_that_the_trainer_counts(way, num_samples, launch):
    for sampler in ways(num_samples, launch, way):
        stream = list(sampler)
        assert len(stream) == len(sampler)
        if sampler.token_budget is None:
            assert all(len(micro_step) <= 1 for micro_step in stream)
        assert all(micro_batch for micro_step in stream for micro_batch in micro_step)


@given(st.integers(1, 90), LAUNCH)
@settings(max_examples=60, deadline=None)
def test_micro_batches_have_the_size_of_the_arguments(num_samples, launch):
    for way in ("by number", "by tokens", "padded"):
        sampler = ways(num_samples, launch, way)[0]
        full, rest = divmod(num_samples, sampler.effective_batch)
        for step in range(full):
            for batches in sampler.plan(step):
                assert [len(batch) for batch in batches] == [sampler.micro_batch] * sampler.accumulation
        if rest:
            sizes = [len(batch) for batches in sampler.plan(full) for batch in batches]
            assert max(sizes) <= sampler.micro_batch


def test_micro_batches_of_a_budget_are_spread_over_the_micro_steps():
    sampler = EffectiveBatchSampler(6, 1, 0, 3, 2, seed=0, strategy="sequential", lengths=[9, 9, 9, 9, 9, 1])
    sampler.token_budget = 10
    assert list(sampler) == [[[0, 5], [1]], [[2], [3], [4]]]


@given(st.integers(1, 90), LAUNCH)
@settings(max_examples=100, deadline=None)
def test_a_micro_batch_assigned_by_number_keeps_the_size_of_the_arguments(num_samples, launch):
    for sampler in samplers(num_samples, launch):
        assert all(len(batch) <= sampler.micro_batch for micro_step in sampler for batch in micro_step)


@pytest.mark.parametrize("way", [way for way in WAYS if "budget" in way])
@given(st.integers(1, 90), LAUNCH)
@settings(max_examples=60, deadline=None)
def test_no_micro_batch_exceeds_the_budget(way, num_samples, launch):
    for sampler in ways(num_samples, launch, way):
        for micro_step in sampler:
            for batch in micro_step:
                assert sampler.cost.tokens([LENGTHS[index] for index in batch]) <= 64


@given(st.integers(1, 90), LAUNCH)
@settings(max_examples=100, deadline=None)
def test_drop_last_drops_only_the_incomplete_batch(num_samples, launch):
    kept = effective_batches(samplers(num_samples, launch, drop_last=True))
    size = launch[0] * launch[1] * launch[2]
    assert kept == [batch for batch in effective_batches(samplers(num_samples, launch)) if len(batch) == size]


def test_epochs_differ_and_repeat_with_the_seed():
    assert epoch_order(50, seed=1, epoch=0) == epoch_order(50, seed=1, epoch=0)
    assert epoch_order(50, seed=1, epoch=0) != epoch_order(50, seed=1, epoch=1)
    assert epoch_order(50, seed=1, epoch=0) != epoch_order(50, seed=2, epoch=0)


def test_an_epoch_that_was_set_has_its_own_order():
    (sampler,) = samplers(20, (1, 1, 4))
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append([index for micro_step in sampler for batch in micro_step for index in batch])
    assert epochs == [epoch_order(20, seed=7, epoch=epoch) for epoch in (0, 1, 0)]


def test_the_order_is_that_of_the_stock_trainer():
    from accelerate.data_loader import SeedableRandomSampler

    stock = SeedableRandomSampler(list(range(50)), data_seed=42)
    stock.set_epoch(3)
    assert epoch_order(50, seed=42, epoch=3) == list(stock)


def test_the_order_by_length_is_that_of_the_stock_trainer_for_the_whole_effective_batch():
    from transformers.trainer_pt_utils import LengthGroupedSampler

    stock = LengthGroupedSampler(8, lengths=LENGTHS, generator=torch.Generator().manual_seed(7))
    (sampler, _) = samplers(90, (2, 2, 2), strategy="group_by_length", lengths=LENGTHS)
    order = [
        i for step in range(sampler.num_steps) for batches in sampler.plan(step) for batch in batches for i in batch
    ]
    stock = list(stock)
    assert [sorted(order[k : k + 8]) for k in range(0, 90, 8)] == [sorted(stock[k : k + 8]) for k in range(0, 90, 8)]


def test_group_by_length_puts_similar_lengths_together():
    lengths = [(7 * i) % 100 for i in range(100)]

    def mean_spread(order):
        batches = [[lengths[i] for i in order[k : k + 10]] for k in range(0, 100, 10)]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    grouped = epoch_order(100, 1, 0, "group_by_length", lengths, effective_batch=10)
    assert sorted(grouped) == list(range(100))
    assert mean_spread(grouped) < 0.7 * mean_spread(epoch_order(100, 1, 0))


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="'by_colour' is not known"):
        epoch_order(4, 0, 0, "by_colour")


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_evaluation_yields_each_sample_once_round_robin_over_ranks(num_samples, world_size, batch_size):
    check_evaluation(num_samples, world_size, batch_size, None)
    check_evaluation(num_samples, world_size, batch_size, LENGTHS[:num_samples])


def test_evaluation_batches_are_balanced_and_the_longest_come_first():
    ranks = [list(EvaluationSampler(5, 2, rank, 2, lengths=[1, 5, 2, 4, 3])) for rank in (0, 1)]
    assert ranks == [[[1, 3], [0]], [[4, 2]]]


def test_evaluation_keeps_the_order_of_equal_lengths_on_every_machine():
    """The sort is stable: others depend on the processor, and all ranks need the same order."""
    batches = EvaluationSampler(1000, 1, 0, 1000, lengths=[i % 2 for i in range(1000)])
    assert list(batches) == [[*range(1, 1000, 2), *range(0, 1000, 2)]]


def check_evaluation(num_samples, world_size, batch_size, lengths):
    place = (num_samples, world_size)
    streams = [list(EvaluationSampler(*place, rank, batch_size, lengths)) for rank in range(world_size)]
    assert max(map(len, streams)) - min(map(len, streams)) <= 1
    for rank, stream in enumerate(streams):
        assert len(EvaluationSampler(*place, rank, batch_size)) == len(stream)
    seen = [index for stream in streams for batch in stream for index in batch]
    assert sorted(seen) == list(range(num_samples))


def test_rebalancing_has_the_random_order_and_grouping_needs_lengths():
    assert epoch_order(20, 1, 0, "batch_rebalance") == epoch_order(20, 1, 0)
    with pytest.raises(ValueError, match="takes the lengths of the samples"):
        epoch_order(20, 1, 0, "group_by_length")
