"""How a user's DataLoader is split over the ranks, as tables of indices, without processes."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from accelerate_unsloth.data import user_loader
from accelerate_unsloth.data.user_loader import order_of
from accelerate_unsloth.launch.topology import Topology


def rows_of_hub():
    return Dataset.from_dict({"value": list(range(8))})


class EveryOther(torch.utils.data.Sampler):
    """A custom sampler that knows the rank."""

    rank = 0

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(range(self.rank, 8, 2))


class Stream(IterableDataset):
    """Seven numbers without a length."""

    def __iter__(self):
        return iter(range(7))


@pytest.mark.parametrize(
    ("loader", "order"),
    [
        (DataLoader([1, 2, 3], batch_size=2), "sequential"),
        (DataLoader([1, 2, 3], batch_size=2, shuffle=True), "random"),
        (DataLoader([1, 2, 3], sampler=DistributedSampler([1, 2, 3], 2, 0)), "random"),
        (DataLoader([1, 2, 3], sampler=DistributedSampler([1, 2, 3], 2, 1, shuffle=False)), "sequential"),
        (DataLoader([1, 2, 3], sampler=RandomSampler([1, 2, 3], replacement=True)), "sampler"),
        (DataLoader([1, 2, 3], sampler=RandomSampler([1, 2, 3], num_samples=2)), "sampler"),
        (DataLoader([1, 2, 3], sampler=WeightedRandomSampler([1, 1, 1], 3)), "sampler"),
        (DataLoader([1, 2, 3], batch_sampler=[[0], [1, 2]]), "sampler"),
        (DataLoader([1, 2, 3], batch_size=None), "sampler"),
        (DataLoader([1, 2, 3], batch_sampler=BatchSampler(range(3), 2, False)), "sampler"),
        (DataLoader(Stream(), batch_size=2), "stream"),
    ],
)
def test_only_batches_that_pytorch_forms_are_formed_again(loader, order):
    assert order_of(loader) == order


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (
            prepare_data_loader(DataLoader(range(8), batch_size=2), num_processes=2, process_index=0),
            "already split over the ranks",
        ),
        (prepare_data_loader(DataLoader(Stream()), num_processes=2, process_index=0), "already split over the ranks"),
        (DataLoader(range(8), sampler=DistributedSampler(range(4), 2, 0)), "already split over the ranks"),
        (
            DataLoader(range(8), batch_sampler=BatchSampler(DistributedSampler(range(8), 2, 0), 2, False)),
            "already split over the ranks",
        ),
        (DataLoader(range(8), sampler=EveryOther()), "already split over the ranks"),
        (DataLoader(split_dataset_by_node(rows_of_hub().to_iterable_dataset(), 0, 2)), "already split over the ranks"),
        ([1, 2], "A list was given as a loader"),
        (DataLoader(range(8), sampler=(index for index in range(8))), "has no length"),
    ],
)
def test_loaders_that_cannot_be_split_are_rejected(loader, words):
    """They would leave out samples, or end at a different step on each rank."""
    with pytest.raises(ValueError, match=words):
        order_of(loader)


@pytest.mark.parametrize(
    ("loader", "lengths", "words"),
    [
        (DataLoader(range(8), batch_size=2), [1, 2], "2 numbers for 8 samples"),
        (DataLoader(range(8), batch_sampler=[[0], [1]]), [1] * 8, "batches of a custom sampler stay"),
        (DataLoader(Stream(), batch_size=2), [1] * 8, "batches of a stream stay"),
    ],
)
def test_lengths_that_cannot_be_used_are_rejected(loader, lengths, words):
    with pytest.raises(ValueError, match=words):
        user_loader.for_training(loader, Topology(0, 1), accumulation=1, seed=0, lengths=lengths)


def padded_tokens(balance, accumulation=2):
    """Tokens, padding included, that each of two ranks computes in a step of 16 samples."""
    lengths = [(37 * i) % 101 + 1 for i in range(32)]
    loader = DataLoader(list(range(32)), batch_size=4)
    plan = user_loader.for_training(loader, Topology(0, 2), accumulation, seed=0, balance=balance, lengths=lengths)
    ranks = plan._loader.batch_sampler.plan(step=0)
    return [sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) for batches in ranks]


def test_padded_rows_are_balanced_over_the_ranks_with_little_padding():
    balanced, numbered = padded_tokens(balance=True), padded_tokens(balance=False)
    assert max(balanced) - min(balanced) <= max(numbered) - min(numbered)
    assert sum(balanced) < 0.8 * sum(numbered)


def everyone(batches_of, world_size):
    return [list(batches_of(Topology(rank, world_size))) for rank in range(world_size)]


BATCHES = [[9, 1], [2, 3, 4], [5], [6, 7], [8, 0]]


def test_batches_of_a_custom_sampler_are_assigned_round_robin():
    def batches(place):
        epochs = user_loader.for_training(DataLoader(list(range(10)), batch_sampler=BATCHES), place, 1, seed=0)
        return (batch for step in epochs.steps(0, 0, epochs.draw()) for batch in step)

    ranks = everyone(batches, 2)
    assert [[batch.inputs.tolist() for batch in rank] for rank in ranks] == [BATCHES[0::2], BATCHES[1::2]]
    assert all(batch.samples == batch.inputs.tolist() for rank in ranks for batch in rank)


def test_only_a_ranks_own_samples_are_loaded():
    loaded = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            loaded.append(index)
            return index

    epochs = user_loader.for_training(DataLoader(Rows(), batch_sampler=BATCHES), Topology(1, 2), 1, seed=0)
    list(epochs.steps(0, 1, epochs.draw()))
    assert loaded == [6, 7]


def test_batches_of_a_stream_are_assigned_round_robin():
    def batches(place):
        epochs = user_loader.for_training(DataLoader(Stream(), batch_size=2), place, 1, seed=0)
        return (batch for step in epochs.steps(0, 1, None) for batch in step)

    ranks = everyone(batches, 2)
    assert [[batch.inputs.tolist() for batch in rank] for rank in ranks] == [[[4, 5]], [[6]]]
    assert [[batch.samples for batch in rank] for rank in ranks] == [[[(2, 0), (2, 1)]], [[(3, 0)]]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_evaluation_takes_a_repeated_sample_once(batch_size):
    loader = DataLoader(list(range(4)), sampler=[3, 1, 3, 1, 0, 0], batch_size=batch_size)
    ranks = everyone(lambda place: user_loader.for_evaluation(loader, place), 2)
    assert sorted(index for rank in ranks for batch in rank for index in batch.samples) == [0, 1, 3]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_distributed_sampler_does_not_split_twice_or_repeat(shuffle):
    def batches(place):
        sampler = DistributedSampler(range(5), place.world_size, place.rank, shuffle=shuffle)
        epochs = user_loader.for_training(DataLoader(range(5), sampler=sampler, batch_size=2), place, 1, seed=0)
        return (batch for step in epochs.steps(0, 0, None) for batch in step)

    ranks = everyone(batches, 2)
    assert sorted(value for rank in ranks for batch in rank for value in batch.inputs.tolist()) == list(range(5))


def test_a_dataset_that_holds_batches_is_split_batch_by_batch():
    rows = [torch.arange(3), torch.arange(3, 5), torch.arange(5, 9)]
    loader = DataLoader(rows, batch_size=None, shuffle=True)
    ranks = everyone(lambda place: user_loader.for_evaluation(loader, place), 1)
    places = {
        place: value for batch in ranks[0] for place, value in zip(batch.samples, batch.inputs.tolist(), strict=True)
    }
    assert [places[place] for place in sorted(places)] == list(range(9))


@pytest.mark.parametrize("rows", [7, 8])
def test_an_evaluation_gives_each_sample_to_one_rank(rows):
    loader = DataLoader(list(range(rows)), batch_size=2, shuffle=True)
    ranks = everyone(lambda place: user_loader.for_evaluation(loader, place), 3)
    values = [value for rank in ranks for batch in rank for value in batch.inputs.tolist()]
    assert sorted(values) == list(range(rows))
    for rank in ranks:
        assert all(batch.inputs.tolist() == batch.samples for batch in rank)


def test_samples_may_be_named_by_tuples():
    rows = {(row, column): 10 * row + column for row in range(2) for column in range(2)}
    loader = DataLoader(rows, batch_sampler=[[(0, 1), (1, 0)], [(1, 1), (0, 1)]])
    as_json = json.loads(json.dumps(user_loader.for_training(loader, Topology(0, 1), 1, seed=0).draw()))
    epochs = user_loader.for_training(loader, Topology(0, 1), 1, seed=0)
    trained = [batch.inputs.tolist() for step in epochs.steps(0, 0, as_json) for batch in step]
    assert trained == [[1, 10], [11, 1]]
    evaluated = user_loader.for_evaluation(loader, Topology(0, 1))
    assert [batch.samples for batch in evaluated] == [[(0, 1), (1, 0)], [(1, 1)]]


def test_a_loader_with_a_custom_iteration_is_read_as_a_stream():
    class Doubling(DataLoader):
        def __iter__(self):
            return (2 * batch for batch in super().__iter__())

    def batches(place):
        epochs = user_loader.for_training(Doubling([1, 2, 3], batch_size=1), place, 1, seed=0)
        return [batch.inputs.item() for step in epochs.steps(0, 0, None) for batch in step]

    assert everyone(batches, 2) == [[2, 6], [4]]


@pytest.mark.parametrize(
    ("inputs", "rows"), [({"n": 3, "x": torch.ones(4, 2)}, 4), ({"n": 3, "name": "abc"}, 1), (torch.ones(5), 5)]
)
def test_the_samples_of_a_batch_are_counted_by_its_first_list(inputs, rows):
    assert user_loader._rows(inputs) == rows


def test_options_of_the_loader_are_kept():
    loader = DataLoader(list(range(8)), batch_size=2, num_workers=2, drop_last=True, collate_fn=tuple, timeout=9)
    epochs = user_loader.for_training(loader, Topology(0, 1), accumulation=3, seed=0)
    assert (epochs._loader.num_workers, epochs._loader.timeout) == (2, 9)
    assert epochs.num_steps(None) == 1  # one whole effective batch of 6, the rest dropped


class Drawn(torch.utils.data.Dataset):
    """Samples that are drawn when they are read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return int(torch.randint(10**6, ())), int(np.random.randint(10**6)), random.randrange(10**6)


def seed_by_worker(worker):
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(worker)


# Loaders whose batches are formed from a seed, and whose batches a sampler draws.
DRAWN = {
    "seed": lambda **how: DataLoader(Drawn(), batch_size=1, num_workers=2, collate_fn=list, **how),
    "sampler": lambda **how: DataLoader(
        Drawn(), batch_sampler=[[i] for i in range(8)], num_workers=2, collate_fn=list, **how
    ),
}


def drawn_by(rank, loader, seed=0):
    """The numbers of the first sample of each of a rank's two workers."""
    epochs = user_loader.for_training(loader, Topology(rank, 2), 2, seed=0)
    torch.manual_seed(seed)
    first_step = next(epochs.steps(0, 0, epochs.draw()))
    return [number for batch in first_step for number in batch.inputs[0]]


@pytest.mark.parametrize("kind", DRAWN)
def test_workers_of_all_ranks_draw_other_numbers(kind):
    one, other = drawn_by(0, DRAWN[kind]()), drawn_by(1, DRAWN[kind]())
    assert len({*one, *other}) == 12  # 2 ranks x 2 workers x 3 generators
    assert one == drawn_by(0, DRAWN[kind]())
    assert not {*one} & {*drawn_by(0, DRAWN[kind](), seed=1)}


@pytest.mark.parametrize("kind", DRAWN)
def test_a_worker_init_fn_of_the_user_is_the_only_one(kind):
    loader = DRAWN[kind](worker_init_fn=seed_by_worker)
    assert drawn_by(0, loader) == drawn_by(1, loader) == drawn_by(0, loader, seed=1)
