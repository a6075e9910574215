"""A step without any gradient under fp16's scaler, as accelerate calls it."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from accelerate_unsloth.reliability.grad_scaler import allow_steps_without_gradients


@pytest.fixture
def training():
    Accelerator(cpu=True)  # the state that its optimizer asks for
    parameter = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    patches = allow_steps_without_gradients(scaler)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5), scaler=scaler)
    yield parameter, scaler, optimizer
    patches.undo()


def step(parameter, scaler, optimizer, gradient):
    parameter.grad = None if gradient is None else scaler.scale(torch.full((2,), gradient))
    scaler.unscale_(optimizer.optimizer)  # as clipping does
    optimizer.step()


def test_a_step_without_gradients_changes_nothing_and_counts_as_one(training):
    parameter, scaler, optimizer = training
    for _ in range(2):
        step(parameter, scaler, optimizer, None)
    assert parameter.tolist() == [1.0, 1.0]
    assert not optimizer.step_was_skipped  # so the schedule moves, as in other precisions
    step(parameter, scaler, optimizer, 1.0)
    moved = parameter.tolist()
    assert moved[0] < 1.0
    step(parameter, scaler, optimizer, None)
    assert parameter.tolist() == moved
    assert scaler.get_scale() == 8.0


def test_overflows_are_still_found(training):
    parameter, scaler, optimizer = training
    step(parameter, scaler, optimizer, float("inf"))
    assert parameter.tolist() == [1.0, 1.0]
    assert optimizer.step_was_skipped
    assert scaler.get_scale() == 4.0
