"""One step on one rank, without a Trainer: what fits, what is split, what falls back, what is left out."""

from types import SimpleNamespace

import pytest
import torch

from accelerate_unsloth.data.loader import MicroBatch
from accelerate_unsloth.trainers import step as step_module
from accelerate_unsloth.trainers.mixin import DistributedTrainerMixin
from accelerate_unsloth.trainers.step import Step, StepRunner

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], dtype=torch.float64)
LABELLED = [True, True, False, True]


class Work:
    """A mean of squares over labelled rows; `fits(rows)` is how many rows the memory holds."""

    def __init__(self, weight, fits=99):
        self.weight, self.fits, self.runs = weight, fits, []

    def learn(self, inputs, items, step):
        self.runs.append(inputs["rows"])
        rows = ROWS[[row for row in inputs["rows"] if LABELLED[row]]]
        loss = (rows @ self.weight).square().sum() / step.items
        (loss / 2).backward(retain_graph=True)  # some gradients are there before the memory runs out
        if len(inputs["rows"]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        (loss / 2).backward()
        return loss.detach()

    def collate(self, samples):
        return {"rows": list(samples)}

    def items(self, inputs):
        return sum(LABELLED[row] for row in inputs["rows"])

    def tokens(self, inputs):
        return 2 * len(inputs["rows"])

    def length(self, sample):
        return 2


def run(groups, fits=99, on_oversized="stop", falls_back_to=None):
    """Gradient and loss of one step over these micro-batches; with the runner, the step and the work."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    work = Work(weight, fits)

    def fall_back(why):
        allowed = falls_back_to is not None and work.fits != falls_back_to
        work.fits = falls_back_to if allowed else work.fits
        return allowed

    def may_fall_back():
        return falls_back_to is not None and work.fits != falls_back_to

    runner = StepRunner(work, lambda: [weight], on_oversized, fall_back, may_fall_back, rank=3)
    batches = [MicroBatch({"rows": g}, sum(LABELLED[row] for row in g), list(g)) for g in groups]
    step = Step.of(batches, sum(batch.items for batch in batches), 8, "cpu")
    for batch in batches:
        runner.run(step, [batch])
    step.leave_out_skipped([weight])
    return weight.grad, step, runner, work


def expected(rows):
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    loss = (ROWS[rows] @ weight).square().mean()
    loss.backward()
    return weight.grad, loss.detach()


@pytest.mark.parametrize(("repeatable", "copies"), [(True, 2), (False, 1)])
def test_what_later_micro_batches_find_in_memory_is_counted(repeatable, copies, monkeypatch):
    monkeypatch.setattr(step_module, "MAX_REPEATABLE_VALUES", 6 if repeatable else 5)
    assert step_module.gradient_bytes([torch.nn.Parameter(torch.ones(2, 3))]) == 24 * copies


def test_memory_that_runs_out_before_the_forward_splits_the_micro_batch_too(monkeypatch):
    """The gradients of the first micro-batch are copied before the second begins."""
    clone, failed = torch.Tensor.clone, []

    def fails_once(tensor, *args, **kwargs):
        if tensor.shape == (2,) and not failed:
            failed.append(tensor)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", fails_once)
    gradient, _, _, work = run([[0, 1], [2, 3]])
    assert failed
    assert torch.allclose(gradient, expected([0, 1, 3])[0])
    assert work.runs == [[0, 1], [3]]  # the row of 2 has no label


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [2], [1, 3]]])
@pytest.mark.parametrize("fits", [99, 2, 1])
def test_a_step_is_the_same_however_it_is_split(groups, fits):
    gradient, step, _, work = run(groups, fits)
    for found, right in zip((gradient, step.loss), expected([0, 1, 3]), strict=True):
        torch.testing.assert_close(found, right)
    assert step.samples == [row for group in groups for row in group]
    assert (step.failed_tokens > 0) == (max(map(len, groups)) > fits)
    assert [2] not in work.runs  # nothing can be learned from it


def test_a_sample_that_does_not_fit_alone_ends_the_run_with_the_fix():
    with pytest.raises(
        torch.OutOfMemoryError, match=r"On rank 3 sample 0 alone, of 2 tokens, does not fit.*on_oversized='skip'"
    ):
        run([[0, 1]], fits=0)


def test_a_sample_that_does_not_fit_alone_may_be_left_out_of_the_mean():
    _, step, runner, _ = run([[0, 1], [3]], fits=0, on_oversized="skip")
    assert runner.skipped_samples == [0, 1, 3]
    assert float(step.items) == 0
    assert float(step.loss) == 0


def test_the_mean_is_over_what_was_learned(monkeypatch):
    def learn(self, inputs, items, step, learn=Work.learn):
        self.fits = 0 if inputs["rows"] == [1] else 1
        return learn(self, inputs, items, step)

    monkeypatch.setattr(Work, "learn", learn)
    gradient, step, runner, _ = run([[0, 1], [3]], fits=1, on_oversized="skip")
    assert runner.skipped_samples == [1]
    for found, right in zip((gradient, step.loss), expected([0, 3]), strict=True):
        torch.testing.assert_close(found, right)
    assert float(step.items) == 2


def test_where_activations_may_be_recomputed_that_comes_before_leaving_out():
    gradient, _, runner, work = run([[0], [1, 2, 3]], fits=0, falls_back_to=2)
    torch.testing.assert_close(gradient, expected([0, 1, 3])[0])
    assert runner.fell_back
    assert runner.skipped_samples == []
    assert work.fits == 2


def test_large_gradients_are_not_copied_so_nothing_is_repeated(monkeypatch):
    monkeypatch.setattr(step_module, "MAX_REPEATABLE_VALUES", 1)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"On rank 3 a micro-batch does not fit.*per_device_train_batch_size"
    ):
        run([[0, 1]], fits=1)


def test_operations_are_those_of_the_stock_trainer_which_counts_once():
    counted = []

    class Stock:
        model = SimpleNamespace(main_input_name="input_ids")

        def floating_point_ops(self, inputs):
            counted.append(inputs)
            return 6 * inputs["input_ids"].numel() * 7

    class Trainer(DistributedTrainerMixin, Stock):
        _flops_per_value = None

        def __init__(self):
            """Without a model to train."""

    batches = [MicroBatch({"input_ids": torch.ones(2, size)}, 1, []) for size in (3, 5)]
    trainer, stock = Trainer(), Stock()
    for micro_step in (batches, [], batches[:1], [MicroBatch({}, 0, [])]):
        expected = sum(stock.floating_point_ops(batch.inputs) for batch in micro_step if batch.inputs)
        counted.clear()
        assert trainer.floating_point_ops(micro_step) == expected
        assert len(counted) == (micro_step is batches)
