"""A run from its first step to the files it leaves: checkpoint, resume on another number of processes, save, merge."""

import json
import os
import stat

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..launching import WORKERS, launch, result

pytestmark = pytest.mark.launch


def start(folder, tiny_model, uneven_data, processes, accumulation, **options):
    folder.mkdir()
    arguments = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 4}
    options = {"args": arguments | {"num_train_epochs": 2}} | options
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, folder, json.dumps(options)],
        processes,
        environment={"HF_HOME": str(folder / "cache")},
    )
    assert finished.status == 0, finished.output[-4000:]
    return folder


BY_NUMBER = {"plugin": {"balance_tokens": False}}

# name: (resumed from the checkpoint of which run, at which step; processes, gradient accumulation, further options).
# The effective batch is 4 in each. Steps 4 and 8 lie in the middle of the first epoch, of 6 steps, and of the second.
RUNS = {
    "whole": (None, 0, 2, 2, {"save": True}),
    "on one process": ("whole", 4, 1, 4, {}),
    "on as many": ("whole", 8, 2, 2, {}),
    "on four": ("whole", 8, 4, 1, {}),
    "on as many, dealt by number": ("whole", 4, 2, 2, BY_NUMBER),
    "on four, dealt by number": ("on as many, dealt by number", 8, 4, 1, BY_NUMBER),
}


@pytest.fixture(scope="module")
def run(tiny_model, uneven_data, tmp_path_factory):
    """Run one of RUNS, once: its folder."""
    folders = {}

    def once(name):
        if name not in folders:
            source, step, processes, accumulation, options = RUNS[name]
            resume = {} if source is None else {"resume": str(once(source) / "run" / f"checkpoint-{step}")}
            folder = tmp_path_factory.mktemp("life") / "run"
            folders[name] = start(folder, tiny_model, uneven_data, processes, accumulation, **options, **resume)
        return folders[name]

    return once


@pytest.fixture(scope="module")
def whole(run):
    return run("whole")


def test_a_run_that_had_ended_says_so(whole, tiny_model, uneven_data, tmp_path):
    arguments = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "no"}
    options = {"args": arguments, "resume": str(whole / "run" / "checkpoint-12")}
    finished = launch(WORKERS / "train.py", [tiny_model, uneven_data, tmp_path, json.dumps(options)], 2)
    assert finished.status == 0, finished.output[-4000:]
    assert finished.output.count("is the end of its run (step 12 of 12), so nothing was left to train") == 1


@pytest.mark.parametrize("resumed", [name for name in RUNS if name != "whole"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(resumed, run, whole):
    one, other = result(whole), result(run(resumed))
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert other["learning_rates"] == one["learning_rates"]
    assert other["num_tokens"] == one["num_tokens"]
    _, _, processes, _, options = RUNS[resumed]
    assert other["samples_dealt"] == ("planned" if processes == 1 or options is BY_NUMBER else "balanced")
    one, other = load_file(whole / "weights0.safetensors"), load_file(run(resumed) / "weights0.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_run_resumed_on_as_many_processes_is_the_uninterrupted_one_bit_for_bit(run, whole):
    assert result(run("on as many"))["losses"] == result(whole)["losses"]
    one, other = load_file(whole / "weights0.safetensors"), load_file(run("on as many") / "weights0.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_effective_batch_is_refused_with_the_accumulation_that_keeps_it(
    whole, tiny_model, uneven_data, tmp_path
):
    options = {"args": {"gradient_accumulation_steps": 2}, "resume": str(whole / "run" / "checkpoint-4")}
    arguments = [tiny_model, uneven_data, tmp_path, json.dumps(options)]
    finished = launch(WORKERS / "train.py", arguments, processes=1)
    assert finished.status != 0
    assert "effective batch of 4 samples, and this launch has 2" in finished.output
    assert "gradient_accumulation_steps=4" in finished.output


def test_all_that_is_written_has_the_permissions_of_the_umask(whole):
    umask = os.umask(0)
    os.umask(umask)  # this looks at it
    written = [file for name in ("run", "adapter", "merged") for file in (whole / name).rglob("*") if file.is_file()]
    modes = {str(file.relative_to(whole)): oct(stat.S_IMODE(file.stat().st_mode)) for file in written}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~umask))


def test_one_rank_writes_and_the_others_do_not(whole):
    first, second = result(whole, 0)["saves"], result(whole, 1)["saves"]
    assert {"adapter", "merged", "checkpoint-4", "checkpoint-8", "checkpoint-12"} <= set(first)
    assert second == []


def test_the_adapter_loads_with_plain_peft_and_computes_what_the_merged_model_does(whole, tiny_model):
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), whole / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(whole / "merged")
    tokenizer = AutoTokenizer.from_pretrained(whole / "merged")
    ids = tokenizer("a rank sends its gradient", return_tensors="pt").input_ids
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
