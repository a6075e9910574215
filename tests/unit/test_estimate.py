"""Estimates of memory, compared with measurements."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from typer.testing import CliRunner

from accelerate_unsloth import reduction
from accelerate_unsloth.commands import app
from accelerate_unsloth.memory import budget, model_sizes
from accelerate_unsloth.memory.budget import GIB, ModelShape
from accelerate_unsloth.memory.estimate import estimate
from accelerate_unsloth.memory.model_sizes import KNOWN
from accelerate_unsloth.memory.optimizer_state import state_bytes, state_bytes_or_adams
from accelerate_unsloth.testing.tiny_model import DIMENSIONS, VOCABULARY

from ..launching import ROOT, clean_environment

LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 49152)


def test_the_largest_micro_batch_fills_the_part_of_the_gpu_that_may_be_used():
    found = estimate(LLAMA_8B)
    tokens = found.largest_micro_batch(24, fraction=0.9)
    assert found.most_gib(tokens) <= 0.9 * 24 < found.most_gib(tokens + 10)
    assert estimate(LLAMA_8B, load_in_4bit=False).largest_micro_batch(12) == 0


def measured_in(file):
    for run in json.loads((ROOT / "benchmarks" / file).read_text()).values():
        kind = (run["model"], run["bits"], run.get("r", 16), run.get("optim", "adamw_8bit"))
        for case in run["cases"]:
            yield (*kind, case["checkpointing"] == "unsloth", case["tokens"], case["peak_gib"])


FITTED, HELD_OUT = [*measured_in("memory_h200.json")], [*measured_in("memory_h100.json")]


def predicted_gib(model, bits, r, optim, checkpointing, tokens):
    shape = KNOWN[model][1] if model in KNOWN else shape_of(*DIMENSIONS[model], tied=model == "135m")
    found = estimate(shape, load_in_4bit=bits == 4, r=r, optim=optim, checkpointing=checkpointing)
    return found.peak_gib(tokens) - found.context_gib  # PyTorch counts what it allocates


def shape_of(hidden, intermediate, layers, heads, kv_heads, tied):
    return ModelShape(hidden, intermediate, layers, heads, kv_heads, hidden // heads, VOCABULARY, tied)


@pytest.mark.parametrize("case", FITTED, ids=str)
def test_peaks_are_within_15_percent_of_those_measured(case):
    *kind, measured_gib = case
    assert predicted_gib(*kind) == pytest.approx(measured_gib, rel=0.15)


@pytest.mark.parametrize("case", HELD_OUT, ids=str)
def test_peaks_of_models_that_nothing_was_fitted_to_are_within_5_percent(case):
    """Other dims, vocabularies, an architecture with biases, another rank and optimizer."""
    *kind, measured_gib = case
    assert predicted_gib(*kind) == pytest.approx(measured_gib, rel=0.05)


def test_weights_and_cuda_contexts_are_as_measured():
    runs = json.loads((ROOT / "benchmarks" / "memory_h100.json").read_text())
    for run in runs.values():
        two = estimate(KNOWN[run["model"]][1], run["bits"] == 4, run["r"], run["optim"], num_gpus=2)
        assert two.weights_gib == pytest.approx(run["weights_gib"], rel=0.05)
    contexts = [case["outside_of_torch_gib"] for case in runs["3B_4_alone"]["cases"]]
    assert max(contexts) == pytest.approx(two.context_gib, rel=0.1)


def test_all_kinds_of_cases_were_measured():
    kinds = {(model, bits, checkpointing) for model, bits, _, _, checkpointing, _, _ in FITTED}
    assert len(kinds) == 3 * 2 * 2


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_smaller_micro_batch_takes_more_than_the_largest_that_fits(checkpointing):
    """The loss is split in four if its scratch memory would exceed 4 GiB, so memory does not grow with every token."""
    left_bytes = 6 * GIB
    largest = LLAMA_8B.tokens_within(left_bytes, checkpointing)
    assert LLAMA_8B.activation_bytes_at_most(largest + 1, checkpointing) > left_bytes
    for tokens in range(1, largest + 1, 7):
        assert LLAMA_8B.activation_bytes(tokens, checkpointing) <= left_bytes


def test_each_choice_changes_its_own_item():
    one, two = estimate(LLAMA_8B), estimate(LLAMA_8B, num_gpus=2)
    assert (one.reduction_gib, two.reduction_gib) == (0.0, 2 * reduction.CHUNK_BYTES / GIB)
    assert estimate(LLAMA_8B, r=1, num_gpus=2).reduction_gib == estimate(LLAMA_8B, r=1).gradients_gib
    assert estimate(LLAMA_8B, optim="adamw_torch").optimizer_gib == pytest.approx(4 * one.optimizer_gib)
    assert estimate(LLAMA_8B, checkpointing=False).token_kib > 10 * one.token_kib
    assert estimate(LLAMA_8B, r=32).adapters_gib == pytest.approx(2 * one.adapters_gib)


def test_the_state_of_every_optimizer_of_the_trainer_is_known():
    for optim in OptimizerNames:
        assert state_bytes(optim) == state_bytes(optim.value)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "rmsprop"])
def test_the_state_of_an_optimizer_has_the_stated_size(optim):
    """Optimizers that need no GPU, made by the Trainer, after one step."""
    weight = torch.nn.Linear(64, 64, bias=False)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=optim, use_cpu=True))
    optimizer = kind(weight.parameters(), **options)
    weight(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in kept if isinstance(value, torch.Tensor) and value.dim() == 2)
    assert held == state_bytes(optim) * weight.weight.numel()


def test_an_optimizer_that_the_trainer_does_not_know_is_rejected():
    with pytest.raises(ValueError, match=r"Did you mean 'adamw_8bit'\?"):
        estimate(LLAMA_8B, optim="adamw_8bits")
    assert state_bytes_or_adams("a_later_optimizer") == 8


@pytest.mark.parametrize(
    "words", [("--gpu-gib", -1), ("--num-gpus", 0), ("--r", -16), ("--tokens", 0), ("--optim", "adamw_9bit")]
)
def test_impossible_numbers_are_rejected(words):
    answer = CliRunner().invoke(app, ["estimate-memory", "8B", *map(str, words)])
    assert answer.exit_code == 2
    assert words[0].strip("-") in answer.output


def run(*words):
    command = [
        sys.executable,
        "-c",
        "from accelerate_unsloth.commands import app; app()",
        "estimate-memory",
        *map(str, words),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=ROOT)


@pytest.mark.launch
def test_the_command_reads_the_config_alone(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    finished = run(tmp_path, "--json", "--gpu-gib", 10, "--tokens", 1000)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(finished.stdout)
    assert [(row["bits"], row["checkpointing"]) for row in rows] == [(4, True), (4, False), (16, True), (16, False)]
    assert all(row["peak_gib"] > row["resting_gib"] > 0 for row in rows)
    assert "all kept" in run(tmp_path).stdout


def test_a_folder_without_a_config_is_named(tmp_path):
    finished = run(tmp_path / "nothing")
    assert finished.returncode == 2
    assert "could not be read" in finished.stderr


def test_the_command_takes_a_size_and_needs_no_model_for_it():
    finished = run("8b", "--json", "--gpu-gib", 24)
    assert finished.returncode == 0, finished.stderr
    shape = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
    assert json.loads(finished.stdout)[0]["largest_micro_batch_tokens"] == estimate(shape).largest_micro_batch(24)


def test_layers_in_the_memory_of_the_machine_leave_three_and_their_constants_on_the_gpu():
    shape = model_sizes.resolve("70B").shape
    for in_4bit in (True, False):
        whole, shared = (estimate(shape, in_4bit, frozen_weights=where) for where in ("replicated", "host"))
        layers_gib = shape.stored_linear_values * (budget.NF4_BYTES if in_4bit else 2) / GIB
        assert shared.host_gib == pytest.approx(layers_gib)
        assert whole.host_gib == 0
        on_gpu_gib = shared.weights_gib - 2 * shape.embedding_values / GIB
        constants_gib = shape.stored_linear_values * (1 / 64 + 4 / (64 * 256)) / GIB if in_4bit else 0
        assert on_gpu_gib == pytest.approx(constants_gib + 3 / 80 * (layers_gib - constants_gib))
    halves = estimate(shape, num_gpus=2, frozen_weights="sharded").weights_gib
    whole, shared = (estimate(shape, frozen_weights=where).weights_gib for where in ("replicated", "host"))
    assert halves == pytest.approx(shared + (whole - shared) * 40 / 77)
    # The model that FSDP-QLoRA is known for: 4 bits, GPUs of 24 GiB.
    fits = [estimate(shape, frozen_weights=where).largest_micro_batch(24) for where in ("replicated", "host")]
    assert fits[0] == 0
    assert fits[1] > 4096


@pytest.mark.parametrize(("words", "hints"), [(["--gpu-gib", 3], True), (["--gpu-gib", 24], False)])
def test_where_nothing_fits_other_placements_are_named(words, hints):
    answer = CliRunner().invoke(app, ["estimate-memory", "8B", *map(str, words)])
    assert answer.exit_code == 0
    assert ("--frozen-weights host keeps the decoder layers" in answer.output) is hints
