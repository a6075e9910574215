"""
Whatever computes the loss, the training is that of plain TRL in one process with the effective batch as one micro-batch.

Weights are compared, because curves can agree while training is wrong.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from accelerate_unsloth.policies import loss
from accelerate_unsloth.testing import tiny_model
from accelerate_unsloth.trainers.router_balance import router_sums

from ..launching import WORKERS, launch, result

EXACT = ["nll", "smoothed", "dft", "mean", "scaled", "mean function", "dividing function", "experts"]
EXACT += ["experts, scaled", "experts, not balanced"]

# launch: (processes, per-device batch, accumulation, options of ours)
LAUNCHES = {
    "one, accumulated": (1, 1, 4, {}),
    "two": (2, 1, 2, {}),
    "three, to a budget": (3, 4, 1, {"micro_batch_tokens": 260}),
    "one, split for lack of memory": (1, 4, 1, {}),
}
MEMORY_TOKENS = 160


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model.make_model("tiny", folder / "dense")
    tiny_model.make_mixture_of_experts(folder / "experts")
    return folder


@pytest.fixture(scope="module")
def run(models, uneven_data, tmp_path_factory):
    """Launch the worker once for each set of options; its folder."""
    folders = {}

    def start(processes, micro_batch, accumulation, **options):
        arguments = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        options = {"kinds": EXACT, "args": arguments | options.pop("args", {})} | options
        key = json.dumps([processes, options])
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run")
            words = [models, uneven_data, folders[key], json.dumps(options)]
            finished = launch(WORKERS / "losses.py", words, processes, timeout_s=300)
            assert finished.status == 0, finished.output[-4000:]
        return folders[key]

    return start


def launched(run, name):
    processes, micro_batch, accumulation, plugin = LAUNCHES[name]
    # Three processes have effective batches of 12, as the oracle has then.
    limited = {"memory_tokens": MEMORY_TOKENS} if "memory" in name else {}
    return run(processes, micro_batch, accumulation, plugin=plugin, **limited)


def oracle(run, name):
    processes, micro_batch, accumulation, _ = LAUNCHES[name]
    return run(1, processes * micro_batch * accumulation, 1, plain=True)


def logged(folder, kind, name):
    return [entry[name] for entry in result(folder)[kind]["log"] if name in entry]


@pytest.mark.launch
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", LAUNCHES)
def test_losses_and_weights_are_those_of_plain_trl(run, name, kind):
    ours, plain = launched(run, name), oracle(run, name)
    assert logged(ours, kind, "loss") == pytest.approx(logged(plain, kind, "loss"), rel=1e-5)
    one, other = (load_file(folder / f"{kind}-0.safetensors") for folder in (plain, ours))
    assert one.keys() == other.keys()
    # Adam turns rounding of a gradient that is nearly zero into a step; such a tensor is compared by the whole model's norm.
    distance = torch.stack([(one[weight] - other[weight]).norm() for weight in one]).norm()
    assert distance / torch.stack([weight.norm() for weight in one.values()]).norm() < 1e-5


@pytest.mark.launch
@pytest.mark.parametrize("metric", ["entropy", "mean_token_accuracy"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_metrics_are_means_over_the_tokens_of_all_ranks(run, name, metric):
    expected = logged(oracle(run, name), "nll", metric)
    assert logged(launched(run, name), "nll", metric) == pytest.approx(expected, rel=1e-4)


@pytest.mark.launch
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_balancing_loss_of_a_step_is_logged(run, name):
    ours, plain = launched(run, name), oracle(run, name)
    assert logged(ours, "experts", "aux_loss") == pytest.approx(logged(plain, "experts", "aux_loss"), rel=1e-5)
    assert logged(ours, "experts, not balanced", "aux_loss") == []


@pytest.mark.launch
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_metric_of_the_users_own_is_logged_as_by_trl(run, name):
    assert set(logged(launched(run, name), "scaled", "doubled")) == {2.0}


@pytest.mark.launch
def test_the_table_says_how_a_custom_loss_is_taken(run):
    seen = result(launched(run, "two"))
    assert "mean per micro-batch" in seen["mean"]["loss"]
    assert "mean per micro-batch" in seen["mean function"]["loss"]
    assert "divides by num_items_in_batch" in seen["scaled"]["loss"]
    assert "divides by num_items_in_batch" in seen["dividing function"]["loss"]
    assert "custom" not in seen["smoothed"]["loss"]


@pytest.mark.launch
def test_a_loss_that_divides_in_part_is_rejected_with_the_fix_on_all_ranks(run):
    folder = run(2, 1, 2, kinds=["mixed"])
    for rank in (0, 1):
        assert "Divide every term by num_items_in_batch, or none" in result(folder, rank)["mixed"]["error"]


@pytest.mark.launch
def test_the_mixin_over_trls_own_trainer_ends_and_is_exact(run):
    """Its loss gathers metrics in every micro-batch, of which ranks have different numbers."""
    budget = {"micro_batch_tokens": 260}
    folder = run(3, 4, 1, kinds=["nll"], plugin=budget, **{"mixin over trl": True})
    expected = oracle(run, "three, to a budget")
    assert logged(folder, "nll", "loss") == pytest.approx(logged(expected, "nll", "loss"), rel=1e-5)


@pytest.mark.launch
def test_the_best_model_may_be_that_of_the_best_accuracy(run):
    one, two = (
        run(n, 1, 4 // n, kinds=["nll"], evaluate=True, args={"per_device_eval_batch_size": 2}) for n in (1, 2)
    )
    accuracies = logged(one, "nll", "eval_mean_token_accuracy")
    assert len(accuracies) == 2
    assert all(0 < accuracy < 1 for accuracy in accuracies)
    assert logged(two, "nll", "eval_mean_token_accuracy") == pytest.approx(accuracies, rel=1e-6)
    assert logged(two, "nll", "eval_entropy") == pytest.approx(logged(one, "nll", "eval_entropy"), rel=1e-5)


def test_ranks_without_a_loss_have_no_say_and_others_have_to_agree():
    assert loss.resolve([None, 1.001]).divides is False
    assert loss.resolve([0.499, None]).divides is True
    with pytest.raises(ValueError, match=r"it returned 0\.500, 1\.000 times"):
        loss.resolve([0.5, 1.0])


def test_the_balancing_loss_is_transformers(tmp_path):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(12, 5, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    for attention_mask in (None, mask):
        sums = router_sums(logits, 2, attention_mask)
        expected = load_balancing_loss_func(logits, 5, 2, attention_mask)
        torch.testing.assert_close(sums.loss_with(sums.assigned, sums.rows), expected)
