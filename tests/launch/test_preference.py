"""
Preference trainers train as plain TRL does in one process with the effective batch as one micro-batch.

Weights are compared, because curves can agree while training is wrong.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from ..launching import WORKERS, launch, result

pytestmark = pytest.mark.launch
TRAINERS = ("dpo", "reward", "orpo", "cpo", "kto")

# launch: (processes, per-device batch, accumulation, further options)
LAUNCHES = {
    "one, accumulated": (1, 1, 4, {}),
    "two": (2, 1, 2, {}),
    "four": (4, 1, 1, {}),
    "three, to a budget": (3, 4, 1, {"plugin": {"micro_batch_tokens": 400}}),
    "one, split for lack of memory": (1, 4, 1, {"memory_tokens": 260}),
}


@pytest.fixture(scope="module")
def run(tiny_model, preference_data, tmp_path_factory):
    """Launch the worker once for each set of options, with all trainers; the folder of one of them."""
    folders = {}

    def start(trainer, processes, micro_batch, accumulation, **options):
        arguments = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        options = {"trainers": TRAINERS, "args": arguments | options.pop("args", {})} | options
        key = json.dumps([processes, options])
        if key not in folders:
            folder = tmp_path_factory.mktemp("run")
            words = [tiny_model, preference_data, folder, json.dumps(options)]
            finished = launch(WORKERS / "preference.py", words, processes, timeout_s=300)
            assert finished.status == 0, finished.output[-4000:]
            folders[key] = folder
        return folders[key] / trainer

    return start


def launched(run, trainer, name):
    processes, micro_batch, accumulation, options = LAUNCHES[name]
    return run(trainer, processes, micro_batch, accumulation, **options)


def oracle(run, trainer, name):
    processes, micro_batch, accumulation, _ = LAUNCHES[name]
    return run(trainer, 1, processes * micro_batch * accumulation, 1, plain=True)


def logged(folder, name):
    return [entry[name] for entry in result(folder)["log"] if name in entry]


def distance(one, other):
    first, second = (load_file(folder / "weights0.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    apart = torch.stack([(first[name] - second[name]).norm() for name in first]).norm()
    return float(apart / torch.stack([weight.norm() for weight in first.values()]).norm())


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_losses_and_weights_are_those_of_plain_trl(run, trainer, name):
    ours, plain = launched(run, trainer, name), oracle(run, trainer, name)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert distance(ours, plain) < 1e-5


# A mean over pairs plus a mean over tokens.
WITH_SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}


@pytest.mark.parametrize("name", ["one, accumulated", "three, to a budget", "one, split for lack of memory"])
def test_dpo_with_the_loss_of_sft_is_that_of_plain_trl(run, name):
    processes, micro_batch, accumulation, options = LAUNCHES[name]
    batch, arguments = processes * micro_batch * accumulation, WITH_SFT | {"per_device_eval_batch_size": 7}
    plain = run("dpo", 1, batch, 1, plain=True, trainers=["dpo"], evaluate=True, args=arguments)
    arguments = WITH_SFT | {"per_device_eval_batch_size": 2}
    more = {} if "memory_tokens" in options else {"evaluate": True}  # the limit is that of training
    ours = run("dpo", processes, micro_batch, accumulation, trainers=["dpo"], args=arguments, **options, **more)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert distance(ours, plain) < 1e-5
    if more:
        assert result(ours)["before"]["eval_loss"] == pytest.approx(result(plain)["before"]["eval_loss"], rel=1e-5)


METRICS = {
    "dpo": ["rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"],
    "reward": ["mean_reward", "accuracy", "margin", "min_reward", "max_reward"],
    "orpo": ["rewards/chosen", "rewards/margins", "logps/rejected", "nll_loss", "log_odds_chosen"],
    "cpo": ["rewards/chosen", "rewards/accuracies", "logps/chosen", "nll_loss"],
    "kto": ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"],
}


@pytest.mark.parametrize(("trainer", "metric"), [(t, metric) for t in TRAINERS for metric in METRICS[t]])
@pytest.mark.parametrize("name", ["two", "three, to a budget"])
def test_metrics_are_those_of_the_whole_step(run, trainer, metric, name):
    expected = logged(oracle(run, trainer, name), metric)
    assert logged(launched(run, trainer, name), metric) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_table_names_pairs_and_tokens_are_those_of_all_ranks(run, trainer):
    one, two = launched(run, trainer, "one, accumulated"), launched(run, trainer, "two")
    rows = {row[0]: row[1] for row in result(two)["decisions"]}
    assert rows["loss"] == f"mean over all {'answers' if trainer == 'kto' else 'pairs'}"
    assert rows["samples"] == "balanced"
    assert logged(one, "num_tokens") == logged(two, "num_tokens")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_evaluation_does_not_depend_on_the_processes(run, trainer):
    arguments = {"per_device_eval_batch_size": 2, "max_steps": 1}
    one, two = (run(trainer, n, 1, 4 // n, evaluate=True, args=arguments) for n in (1, 2))
    metric = METRICS[trainer][0]
    for name in ("eval_loss", f"eval_{metric}"):
        assert result(one)["before"][name] == pytest.approx(result(two)["before"][name], rel=1e-5)


@pytest.mark.parametrize("trainer", [trainer for trainer in TRAINERS if trainer != "kto"])
def test_the_evaluation_loss_is_that_of_the_whole_set_as_one_batch(run, trainer):
    """But for KTO, whose KL divergence is that of each batch."""
    ours = run(trainer, 2, 1, 2, evaluate=True, args={"per_device_eval_batch_size": 2, "max_steps": 1})
    plain = run(trainer, 1, 4, 1, evaluate=True, plain=True, args={"per_device_eval_batch_size": 7, "max_steps": 1})
    assert result(ours)["before"]["eval_loss"] == pytest.approx(result(plain)["before"]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_resumes_on_another_number_of_processes(run, trainer):
    saving = {"save_strategy": "steps", "save_steps": 3}
    one = run(trainer, 1, 1, 4, args=saving)
    resumed = run(trainer, 2, 1, 2, resume=str(one.parent / "{trainer}" / "run" / "checkpoint-3"))
    assert logged(resumed, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert distance(resumed, one) < 1e-5


LACKING = "6 of 22 samples of the training dataset, the first at index 2, have no token of an answer"
WEIGHTED_SFT = {"loss_type": ["sft"], "use_weighting": True}


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ("dpo", {"args": {"loss_type": ["aot"]}}, "loss_type='aot' sorts the pairs of a micro-batch"),
        ("dpo", {"args": WEIGHTED_SFT}, "use_weighting=True multiplies the loss 'sft'"),
        ("orpo", {"args": {"max_length": 24}}, LACKING),
        ("cpo", {"args": {"max_length": 24}}, LACKING),
        ("dpo", {"args": {"max_length": 1}}, "22 of 22 samples of the dataset 'train' are left out"),
        ("reward", {"args": {"max_length": 2}}, "22 of 22 samples of the dataset 'train' are left out"),
        ("dpo", {"without": ["rejected"]}, "a pair needs 'chosen' and 'rejected'"),
        ("dpo", {"renamed": {"prompt": "prmpt"}}, "the column 'prmpt', which is not read, and no 'prompt'"),
        ("reward", {"without": ["chosen"]}, "a pair needs 'chosen' and 'rejected'"),
    ],
)
def test_what_cannot_be_exact_or_read_is_one_error_that_ends_all(
    trainer, options, message, tiny_model, preference_data, tmp_path
):
    words = [tiny_model, preference_data, tmp_path, json.dumps({"trainers": [trainer], **options})]
    finished = launch(WORKERS / "preference.py", words, 2, timeout_s=90)
    assert finished.status != 0
    assert finished.output.count(message) == 1


def test_samples_that_trl_leaves_out_are_counted(tiny_model, preference_data, tmp_path):
    options = {"trainers": ["dpo", "kto", "reward"], "args": {"max_length": 24, "max_steps": 1}}
    finished = launch(WORKERS / "preference.py", [tiny_model, preference_data, tmp_path, json.dumps(options)], 2)
    assert finished.status == 0, finished.output[-4000:]
    assert finished.output.count("6 of 22 samples of the dataset 'train' are left out") == 3  # for the last one 16
