"""The trainer that Unsloth generates, in one and two processes. Its kernels need a GPU: see tests/gpu."""

import json

import pytest

from .launching import WORKERS, launch, result

pytestmark = [pytest.mark.launch, pytest.mark.unsloth]


@pytest.fixture(scope="module")
def runs(tiny_model, uneven_data, tmp_path_factory):
    folders = {}
    for processes, accumulation in ((1, 4), (2, 2)):
        folder = tmp_path_factory.mktemp("unsloth")
        # Unsloth writes the trainers that it generates, so each run gets a folder of its own.
        environment = {"HF_HOME": str(folder / "cache"), "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
        arguments = [tiny_model, uneven_data, folder, accumulation]
        finished = launch(WORKERS / "unsloth_trainer.py", arguments, processes, environment, real_launcher=True)
        assert finished.status == 0, finished.output[-4000:]
        folders[processes] = folder
    return folders


def test_the_loaders_keep_unsloths_calls_and_leave_other_gpus_alone():
    finished = launch(WORKERS / "unsloth_loader.py", processes=1, real_launcher=True)
    assert finished.status == 0, finished.output[-3000:]
    seen = json.loads(finished.output.splitlines()[-1])
    assert seen["same_signature"] == [True] * 4
    assert seen["inherited"]
    assert seen["built"] == ["cuda:1", "cpu"]


def test_the_mixin_sits_on_unsloths_trainer_and_token_count(runs):
    assert result(runs[2])["trainer"] == "UnslothSFTTrainer"
    assert result(runs[2])["get_batch_samples"] == "_unsloth_get_batch_samples"


def test_two_processes_give_the_losses_of_one(runs):
    one, two = result(runs[1]), result(runs[2])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["num_tokens"] == one["num_tokens"]


def test_unsloths_preparation_runs_once_a_node(runs):
    assert 22 in result(runs[2], rank=0)["mapped_rows"] + result(runs[1])["mapped_rows"]
    assert max(result(runs[2], rank=1)["mapped_rows"]) <= 8
