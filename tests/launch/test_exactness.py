"""The promise: the same samples, losses and weights on any number of processes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..launching import WORKERS, launch, result

pytestmark = pytest.mark.launch

# `adam_epsilon` is larger than the rounding of a gradient, which Adam would otherwise raise to the learning rate.
STREAM = {"stream": True, "args": {"max_steps": 8, "adam_epsilon": 1e-5}}
# The embeddings and the head learn a hundred times slower than the adapters.
EMBEDDINGS = {
    "lora": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "args": {"embedding_learning_rate": 1e-4, "lr_scheduler_type": "constant", "adam_epsilon": 1e-3},
}
# name: (processes, gradient accumulation, further options); the effective batch is 4 in each
RUNS = {
    "one": (1, 4, {"evaluate": True}),
    "two": (2, 2, {"evaluate": True}),
    "four": (4, 1, {}),
    "two, rank means asked for": (2, 2, {"args": {"average_tokens_across_devices": False}}),
    "two, dealt by number": (2, 2, {"plugin": {"balance_tokens": False}, "resume": False}),
    "two, more micro-batches than asked": (
        2,
        1,
        {"args": {"per_device_train_batch_size": 2}, "plugin": {"micro_batch_tokens": 130}},
    ),
    "one, planned micro-batches": (
        1,
        1,
        {"args": {"per_device_train_batch_size": 4}, "plugin": {"micro_batch_tokens": 250}},
    ),
    "one, packed": (1, 4, {"args": {"packing": True, "max_length": 64}}),
    "two, packed": (2, 2, {"args": {"packing": True, "max_length": 64}}),
    "one, stream": (1, 4, STREAM),
    "two, stream": (2, 2, STREAM),
    "one, embeddings": (1, 4, EMBEDDINGS),
    "two, embeddings": (2, 2, EMBEDDINGS),
    "two, real launcher": (2, 2, {"evaluate": True}),
    "two, no all-reduce": (2, 2, {"sabotage": "no all-reduce"}),
    "two, mean of rank means": (2, 2, {"sabotage": "mean of rank means"}),
}


@pytest.fixture(scope="module")
def run(tiny_model, uneven_data, tmp_path_factory):
    """Run one of RUNS, once: its folder with results and weights of each rank."""
    folders = {}

    def start(name):
        if name not in folders:
            processes, accumulation, options = RUNS[name]
            folder = tmp_path_factory.mktemp("run")
            options = options | {"args": {"gradient_accumulation_steps": accumulation} | options.get("args", {})}
            arguments = [tiny_model, uneven_data, folder, json.dumps(options)]
            finished = launch(
                WORKERS / "train.py",
                arguments,
                processes,
                environment={"HF_HOME": str(folder / "cache")},
                real_launcher=name == "two, real launcher",
            )
            assert finished.status == 0, finished.output[-4000:]
            folders[name] = folder
        return folders[name]

    return start


def difference(first, second, rank=0):
    """Largest relative difference of a loss and of a weight tensor."""
    losses = zip(result(first)["losses"], result(second)["losses"], strict=True)
    loss = max(abs(a - b) / abs(a) for a, b in losses)
    one, other = load_file(first / "weights0.safetensors"), load_file(second / f"weights{rank}.safetensors")
    assert one.keys() == other.keys()
    weight = max(torch.linalg.vector_norm(one[n] - other[n]) / torch.linalg.vector_norm(one[n]) for n in one)
    return loss, float(weight)


OTHERS = [name for name in RUNS if name != "one" and "sabotage" not in RUNS[name][2]]
OTHERS = [name for name in OTHERS if not any(word in name for word in ("packed", "stream", "embeddings"))]


@pytest.mark.parametrize("other", OTHERS)
def test_several_processes_give_the_losses_and_weights_of_one(run, other):
    loss, weight = difference(run("one"), run(other))
    assert loss < 1e-5
    assert weight < 1e-5


def test_rows_packed_from_several_documents_are_trained_the_same(run):
    one, two = run("one, packed"), run("two, packed")
    loss, weight = difference(one, two)
    assert loss < 1e-5
    assert weight < 1e-5
    assert len(result(two)["losses"]) < len(result(run("two"))["losses"])


def test_embeddings_are_trained_with_a_learning_rate_of_their_own(run, tiny_model):
    one, two = run("one, embeddings"), run("two, embeddings")
    loss, weight = difference(one, two)
    assert loss < 1e-5
    assert weight < 1e-5
    start, end = load_file(tiny_model / "model.safetensors"), load_file(two / "weights0.safetensors")
    steps, saved = len(result(two)["losses"]), [name for name in end if "modules_to_save" in name]
    assert len(saved) == 2
    # A step of Adam moves a weight by about its learning rate at most.
    for name in saved:
        before = start["lm_head.weight" if "lm_head" in name else "model.embed_tokens.weight"]
        assert 0.5e-4 < (end[name] - before).abs().max() < 2e-4 * steps
    assert all(weight.abs().max() > 0.5e-2 for name, weight in end.items() if "lora_B" in name)  # they begin at 0


def test_what_a_stream_leaves_over_is_in_no_step_and_no_loss(run):
    """Of 22 samples 20 make five steps; three more follow in the second epoch."""
    one, two = run("one, stream"), run("two, stream")
    loss, weight = difference(one, two)
    assert loss < 1e-5
    assert weight < 1e-5
    first, again = (result(one)["log_history"][step] for step in (0, 5))
    assert 0.5 < again["loss"] / first["loss"] < 1.1  # the same samples, trained on once


def test_forked_processes_compute_what_the_launchers_do(run):
    """What the tests rely on that fork their ranks: see tests/forking."""
    folders = run("two, real launcher"), run("two")
    for rank in (0, 1):
        real, forked = (result(folder, rank) for folder in folders)
        for seen in (real, forked):
            del seen["log_history"], seen["data_files"]  # which tell the time and the folder
        assert real == forked
        one, other = (load_file(folder / f"weights{rank}.safetensors") for folder in folders)
        assert all(torch.equal(one[weight], other[weight]) for weight in one)


@pytest.mark.parametrize("broken", ["two, no all-reduce", "two, mean of rank means"])
def test_the_comparison_notices_a_broken_reduction(run, broken):
    loss, weight = difference(run("one"), run(broken))
    assert max(loss, weight) > 1e-3


def test_samples_are_dealt_by_tokens_unless_told_otherwise(run):
    assert result(run("two"))["samples_dealt"] == "balanced"
    assert result(run("two, dealt by number"))["samples_dealt"] == "planned"
    assert result(run("two, more micro-batches than asked"))["micro_batch_tokens"] <= 130


def test_a_step_without_any_label_changes_nothing(tiny_model, tmp_path):
    rows = [{"input_ids": [5 + n, 6, 7 + n, 8], "labels": [5 + n, 6, 7 + n, 8]} for n in range(12)]
    for row in rows[4:8]:  # the second step of three
        row["labels"] = [-100] * 4
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, start=1):
        folder.mkdir()
        arguments = {"gradient_accumulation_steps": 4 // processes, "train_sampling_strategy": "sequential"}
        arguments["max_length"] = None  # cutting rows leaves their labels out (trl 1.15.0)
        options = {"args": arguments}
        finished = launch(WORKERS / "train.py", [tiny_model, data, folder, json.dumps(options)], processes)
        assert finished.status == 0, finished.output[-3000:]
    one, two = map(result, folders)
    assert one["losses"][1] == two["losses"][1] == 0
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["num_tokens"] == two["num_tokens"] == [16, 32, 48]
    first, second = (load_file(folder / "weights0.safetensors") for folder in folders)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_an_evaluation_without_any_label_has_no_loss(tiny_model, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3 if n < 7 else [5, 6, 7]} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"evaluate": True, "args": {"max_length": None, "gradient_accumulation_steps": 4}}
    finished = launch(WORKERS / "train.py", [tiny_model, data, tmp_path, json.dumps(options)], processes=2)
    assert finished.status == 0, finished.output[-3000:]
    assert math.isnan(result(tmp_path)["eval_losses"][0])


def test_data_of_which_drop_last_leaves_nothing_is_refused_with_words(tiny_model, uneven_data, tmp_path):
    options = {"args": {"per_device_train_batch_size": 64, "dataloader_drop_last": True}}
    finished = launch(WORKERS / "train.py", [tiny_model, uneven_data, tmp_path, json.dumps(options)], processes=1)
    assert finished.status != 0
    assert "leaves nothing of 22 samples, because an effective batch has 64" in finished.output


def test_all_ranks_end_with_the_same_weights(run):
    for rank in range(4):
        _, weight = difference(run("four"), run("four"), rank)
        assert weight == 0


def test_a_last_incomplete_batch_repeats_and_loses_nothing(run):
    one, four = result(run("one")), result(run("four"))
    assert len(four["losses"]) == 6  # 22 samples in effective batches of 4
    assert one["num_tokens"] == four["num_tokens"]


def test_the_evaluation_loss_does_not_depend_on_the_processes(run):
    one, two = result(run("one"))["eval_losses"], result(run("two"))["eval_losses"]
    assert one == pytest.approx(two, rel=1e-6)


def test_gradients_are_reduced_after_the_backward_without_ddp(run):
    assert result(run("two"))["wrapper"] == "PeftModelForCausalLM"


def test_the_data_set_is_tokenised_once_a_node(run):
    first, second = result(run("two"), rank=0)["mapped_rows"], result(run("two"), rank=1)["mapped_rows"]
    assert 22 in first
    assert max(second) <= 8  # the rows that set up the trainer


def files_of_data(folder):
    """Without locks, whose names hold the folder."""
    files = [file for file in (folder / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
    return sorted(str(file.relative_to(folder)) for file in files)


@pytest.mark.parametrize("how", ["", ", packed"])
def test_all_processes_map_the_files_of_map_and_write_no_others(run, how):
    one, two = run(f"one{how}"), run(f"two{how}")
    mapped = [[str(Path(file).relative_to(two)) for file in result(two, rank)["data_files"]] for rank in (0, 1)]
    assert mapped[0] == mapped[1] != []
    assert {*mapped[0]} < {*files_of_data(two)}
    assert files_of_data(two) == files_of_data(one)
