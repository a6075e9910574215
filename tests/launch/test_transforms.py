"""Samples that are drawn anew each time they are read: nobody reads them but training, and each rank draws its own."""

import pytest

from ..launching import WORKERS, launch, result

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def ran(tiny_model, tmp_path_factory):
    """Results of one and of two processes."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp("transform")
        finished = launch(WORKERS / "transform.py", [tiny_model, folders[processes]], processes)
        assert finished.status == 0, finished.output[-4000:]
    return [result(folders[1]), result(folders[2]), result(folders[2], rank=1)]


def test_random_transforms_train_on_several_processes(ran):
    assert [found["steps"] for found in ran] == [2, 2, 2]


def test_building_a_trainer_reads_no_more_samples_and_draws_no_more_numbers_than_in_one_process(ran):
    one, *two = ran
    assert [found["reads"] for found in two] == [one["reads"]] * 2
    assert [found["random_states"] for found in two] == [one["random_states"]] * 2


def test_a_loop_reads_each_sample_once_and_on_one_rank(ran):
    assert [found["reads_of_loop"] for found in ran] == [found["samples_of_loop"] for found in ran] == [8, 4, 4]


@pytest.mark.parametrize("generator", [0, 1, 2], ids=["torch", "numpy", "python"])
def test_workers_of_all_ranks_draw_other_numbers_and_the_same_ones_for_the_same_seed(generator, ran):
    ranks = [[[tokens[generator] for tokens in epoch] for epoch in found["draws"]] for found in ran[1:]]
    (first, again, other_seed), (of_other_rank, again_of_other_rank, _) = ranks
    assert first == again
    assert of_other_rank == again_of_other_rank
    assert first != other_seed
    assert len(first) == len(of_other_rank) == 4
    # The two workers of a rank take turns, so that the first two micro-batches are the first of each worker.
    assert len({*first[:2], *of_other_rank[:2]}) == 4
