"""A run from its first step to the files it leaves: checkpoint, resume on another number of processes, save, merge."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .launching import WORKERS, launch, result

pytestmark = pytest.mark.launch


def start(folder, tiny_model, uneven_data, processes, accumulation, real_launcher=False, **options):
    folder.mkdir()
    arguments = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 4}
    options = {"args": arguments | {"num_train_epochs": 2}} | options
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, folder, json.dumps(options)],
        processes,
        environment={"HF_HOME": str(folder / "cache")},
        real_launcher=real_launcher,
    )
    assert finished.status == 0, finished.output[-4000:]
    return folder


@pytest.fixture(scope="module")
def two_processes(tiny_model, uneven_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("life") / "two"
    return start(folder, tiny_model, uneven_data, processes=2, accumulation=2, real_launcher=True, save=True)


# Steps 4 and 8 lie in the middle of the first epoch, of 6 steps, and of the second.
@pytest.mark.parametrize(("step", "processes", "accumulation"), [(4, 1, 4), (8, 1, 4), (8, 2, 2)])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(
    step, processes, accumulation, two_processes, tiny_model, uneven_data, tmp_path
):
    checkpoint = str(two_processes / "run" / f"checkpoint-{step}")
    resumed = start(tmp_path / "resumed", tiny_model, uneven_data, processes, accumulation, resume=checkpoint)
    assert result(resumed)["losses"] == pytest.approx(result(two_processes)["losses"], rel=1e-5)
    assert result(resumed)["num_tokens"] == result(two_processes)["num_tokens"]
    one, other = load_file(two_processes / "weights0.safetensors"), load_file(resumed / "weights0.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_one_rank_writes_and_the_others_do_not(two_processes):
    first, second = result(two_processes, 0)["saves"], result(two_processes, 1)["saves"]
    assert {"adapter", "merged", "checkpoint-4", "checkpoint-8", "checkpoint-12"} <= set(first)
    assert second == []


def test_the_adapter_loads_with_plain_peft_and_computes_what_the_merged_model_does(two_processes, tiny_model):
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), two_processes / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(two_processes / "merged")
    tokenizer = AutoTokenizer.from_pretrained(two_processes / "merged")
    ids = tokenizer("a rank sends its gradient", return_tensors="pt").input_ids
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
