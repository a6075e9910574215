"""The step plan of a run, without a Trainer: what the probe and the steps make of it, the same on all ranks."""

import contextlib

import numpy as np
import pytest
import torch

from accelerate_unsloth import UnslothPlugin
from accelerate_unsloth.data.sampler import EffectiveBatchSampler
from accelerate_unsloth.engines import kernels
from accelerate_unsloth.trainers import planner as module
from accelerate_unsloth.trainers.planner import Planner, in_parts, leaves_memory, worst_case

LENGTHS = np.array([90, 10, 40, 60, 30, 20, 70, 80])


class Channel:
    """A channel of one rank that answers for another one as well."""

    def __init__(self):
        self.other = {}

    def gather(self, name, value):
        return [value, self.other.get(name, value)]


@pytest.fixture
def channel(monkeypatch):
    channel = Channel()
    monkeypatch.setattr(module, "channel", lambda: channel)
    return channel


@pytest.fixture
def model(monkeypatch):
    """A model whose recomputation is only noted."""
    model = torch.nn.Linear(2, 2)
    model.recompute = [False]

    def switch(model, mode):
        model.recompute.append(mode)
        return model.recompute[-2]

    monkeypatch.setattr(kernels, "set_recomputation", switch)
    model.only_first = []
    monkeypatch.setattr(kernels, "layers_that_recompute", lambda model: [])
    monkeypatch.setattr(kernels, "recompute_first", lambda layers, number: model.only_first.append(number))
    return model


def made(model, kept=200, recomputed=400, undo=None, lengths=LENGTHS, partial=(), **options):
    sampler = EffectiveBatchSampler(8, 1, 0, 4, 2, seed=0, strategy="sequential", lengths=lengths)
    planner = Planner(model, "unsloth", UnslothPlugin(**options), torch.device("cpu"), "adamw_torch")
    planner._tokens_that_fit = lambda: (kept, *partial, recomputed)
    planner.resolve(sampler, lengths, undo or contextlib.ExitStack())
    return planner, sampler


def test_the_token_budget_reaches_the_sampler_and_what_was_switched_is_switched_back(channel, model):
    with contextlib.ExitStack() as undo:
        planner, sampler = made(model, kept=80, recomputed=300, undo=undo)
        assert (planner.plan.checkpointing.mode, sampler.token_budget) == ("unsloth", 300)
        assert model.recompute == [False, True]
    assert model.recompute == [False, True, False]


def test_some_layers_keep_their_activations_until_a_rank_runs_out(channel, model):
    """Also after something in the middle of the training has switched all layers alike."""
    with contextlib.ExitStack() as undo:
        planner, sampler = made(model, 8_000, 40_000, undo, LENGTHS * 100, partial=(9_000, 25_000))
        assert (planner.plan.checkpointing.label, sampler.token_budget) == ("1 of 3 layers", 9_000)
        planner.begin_step()
        assert (model.recompute, model.only_first) == ([False, True], [1, 1])
        channel.other = {"out of memory": [9_000, True]}
        assert "activations are recomputed from here on" in planner.lower(0, False, step=7)
        assert (planner.plan.checkpointing.label, sampler.token_budget) == ("unsloth", 40_000)
        planner.begin_step()
        assert (model.recompute[-1], model.only_first) == (True, [1, 1])
    assert model.recompute[-1] is False


def test_the_probe_lowers_the_plan_until_it_fits_on_every_rank(channel, model):
    planner, sampler = made(model, kept=400)
    tried = []

    def fits(samples, in_parts):
        assert in_parts == any(len(batches) > 1 for step in range(sampler.num_steps) for batches in sampler.plan(step))
        tried.append(int(LENGTHS[samples].sum()))
        channel.other = {"probe": tried[-1] <= 150}  # the other rank has less memory
        return True

    planner.probe(fits)
    assert tried[-1] <= 150 < tried[-2]
    assert sampler.token_budget == tried[-1]
    assert "which were tried before training" in planner.plan.micro_batch.reason


def test_the_probe_falls_back_to_recomputation_and_plans_anew_for_it(channel, model):
    planner, sampler = made(model, kept=200)
    planner.probe(lambda samples, in_parts: model.recompute[-1])
    assert planner.plan.checkpointing.mode == "unsloth"
    assert sampler.token_budget > 200


def test_a_sample_that_never_fits_is_an_error_with_its_length(channel, model):
    planner, _ = made(model, kept=200)
    with pytest.raises(torch.OutOfMemoryError, match=r"Sample 0, of 90 tokens, does not fit the memory of rank 0, 1"):
        planner.probe(lambda samples, in_parts: False)
    planner, _ = made(model, kept=200, on_oversized="skip")
    planner.probe(lambda samples, in_parts: False)


def test_a_rank_that_ran_out_lowers_the_plan_of_all(channel, model):
    planner, sampler = made(model)
    channel.other = {"out of memory": [150, False]}
    assert "150 ran out of memory at step 7" in planner.lower(0, False, step=7)
    assert sampler.token_budget == 105


def test_a_rank_that_fell_back_takes_the_others_along(channel, model):
    planner, sampler = made(model)
    channel.other = {"out of memory": [90, True]}
    assert planner.lower(0, False, step=7) == "activations are recomputed from here on: 90 ran out of memory at step 7"
    assert (planner.plan.checkpointing.mode, sampler.token_budget) == ("unsloth", 400)
    assert model.recompute[-1] is True


def test_fixed_micro_batches_stay_as_they_are(channel, model):
    planner, sampler = made(model, micro_batch="fixed")
    planner.probe(lambda samples, in_parts: pytest.fail("nothing to try"))
    assert planner.lower(150, False, step=1) is None
    assert sampler.token_budget is None


def test_the_probe_tries_more_than_the_largest_micro_batch_of_the_epoch():
    sampler = EffectiveBatchSampler(8, 1, 0, 4, 2, seed=0, strategy="sequential", lengths=LENGTHS)
    sampler.token_budget = 110
    largest = max(int(LENGTHS[batch].sum()) for batches in sampler.plan(0) for batch in batches)
    tried = int(LENGTHS[worst_case(sampler)].sum())
    assert largest <= tried <= 110


@pytest.mark.parametrize(("budget", "expected"), [(110, True), (10_000, False)])
def test_steps_of_several_micro_batches_are_found(budget, expected):
    """Of two samples, so that there are two at most."""
    sampler = EffectiveBatchSampler(8, 1, 0, 2, 2, seed=0, strategy="sequential", lengths=LENGTHS)
    sampler.token_budget = budget
    assert in_parts(sampler) is expected


def test_a_probe_leaves_no_gradient_and_no_draw_behind():
    weight = torch.nn.Parameter(torch.ones(2))
    state = torch.get_rng_state()

    def run():
        (weight * torch.rand(2)).sum().backward()
        raise torch.OutOfMemoryError

    assert not leaves_memory(run, [weight], 8, torch.device("cpu"), 0.9)
    assert weight.grad is None
    assert torch.equal(state, torch.get_rng_state())
