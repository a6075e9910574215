"""The trainer that Unsloth generates, in one and two processes. Its kernels need a GPU: see tests/gpu."""

import json

import pytest
import torch
from safetensors.torch import load_file

from accelerate_unsloth.testing.tiny_model import make_mixture_of_experts

from ..launching import WORKERS, launch, result

pytestmark = [pytest.mark.launch, pytest.mark.unsloth]


@pytest.fixture(scope="module", params=["forked", pytest.param("launched", marks=pytest.mark.slow)])
def runs(request, tiny_model, uneven_data, preference_data, tmp_path_factory):
    """Folders of the training in one and two processes, forked after Unsloth was imported, or started by the launcher."""
    if request.param == "forked":
        folder = request.getfixturevalue("unsloth_once")
        return {1: folder / "1", 2: folder / "2"}
    folders, experts = {}, make_mixture_of_experts(tmp_path_factory.mktemp("experts"))
    for processes, accumulation in ((1, 4), (2, 2)):
        folder = tmp_path_factory.mktemp("unsloth")
        # Unsloth writes the trainers that it generates, so each run gets a folder of its own.
        environment = {"HF_HOME": str(folder / "cache"), "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
        environment["TORCHDYNAMO_DISABLE"] = "1"
        arguments = [tiny_model, experts, uneven_data, preference_data, folder, accumulation]
        finished = launch(
            WORKERS / "unsloth_trainer.py", arguments, processes, environment, timeout_s=300, real_launcher=True
        )
        assert finished.status == 0, finished.output[-4000:]
        folders[processes] = folder
    return folders


def test_the_loaders_keep_unsloths_calls_and_leave_other_gpus_alone(unsloth_once):
    seen = json.loads((unsloth_once / "loaders.json").read_text())
    assert seen["same_signature"] == [True] * 4
    assert seen["inherited"]
    assert seen["built"] == ["cuda:1", "cpu"]
    assert seen["offloaded"] == {"equal": True, "left": [], "name": True}
    assert seen["quantized"] == ["folder of the first process", []]


def test_the_mixin_sits_on_unsloths_trainer_and_token_count(runs):
    assert result(runs[2])["trainer"] == "UnslothSFTTrainer"
    assert result(runs[2])["get_batch_samples"] == "_unsloth_get_batch_samples"


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_two_processes_give_the_losses_and_weights_of_one(runs, model):
    one, two = result(runs[1])[model], result(runs[2])[model]
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)
    assert [entry["num_tokens"] for entry in two] == [entry["num_tokens"] for entry in one]
    first, second = (load_file(runs[processes] / f"{model}0.safetensors") for processes in (1, 2))
    distance = torch.stack([(first[name] - second[name]).norm() for name in first]).norm()
    assert distance / torch.stack([weight.norm() for weight in first.values()]).norm() < 1e-5


@pytest.mark.parametrize("trainer", ["dpo", "reward", "orpo", "cpo", "kto"])
def test_preference_trainers_of_unsloth_give_the_losses_and_weights_of_one_process(runs, trainer):
    one, two = result(runs[1])[trainer], result(runs[2])[trainer]
    assert any(base.startswith("Unsloth") for base in two["bases"])
    assert [entry["loss"] for entry in two["log"]] == pytest.approx([entry["loss"] for entry in one["log"]], rel=1e-5)
    first, second = (load_file(runs[processes] / f"{trainer}0.safetensors") for processes in (1, 2))
    distance = torch.stack([(first[name] - second[name]).norm() for name in first]).norm()
    assert distance / torch.stack([weight.norm() for weight in first.values()]).norm() < 1e-5


def test_the_balancing_loss_is_that_of_the_whole_step(runs):
    one, two = ([entry["aux_loss"] for entry in result(runs[n])["experts"]] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    assert all(1.5 < value < 4 for value in one)  # 2 of 4 experts, evenly, give 2


def test_unsloths_preparation_runs_once_a_node(runs):
    assert 22 in result(runs[2], rank=0)["mapped_rows"] + result(runs[1])["mapped_rows"]
    assert max(result(runs[2], rank=1)["mapped_rows"]) <= 8


def test_unsloth_loads_and_adapts_a_model_whose_layers_are_away(unsloth_once):
    """Unsloth's patches and LoRA read no frozen weight of a layer, which would raise an error."""
    log = (unsloth_once / "fetched.txt").read_text()
    assert (unsloth_once / "fetched.json").exists(), log[-3000:]
    seen = json.loads((unsloth_once / "fetched.json").read_text())
    expected = {"mode": "host", "shared": 14, "parameters": 39_072, "in_use": True, "merged": True, "plain": True}
    assert seen == expected
    assert (unsloth_once / "adapter" / "adapter_model.safetensors").exists()
