"""Frozen weights of decoder layers, stored once per node: same results, less memory, nothing left behind."""

import contextlib
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from accelerate_unsloth.testing import tiny_model as tiny_model_files

from ..launching import WORKERS, launch, result

pytestmark = pytest.mark.launch

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

VARIABLE = "ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return tiny_model_files.make_mixture_of_experts(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """520 MB in float32, in a file of bfloat16: pages of a file in the wanted type are shared by all who load it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "vocab_size": 320}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8)
    return written(config, torch.bfloat16, tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """More layers than slots, so that layers are fetched again in the backward."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 320}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return written(config, torch.float32, tmp_path_factory.mktemp("deep"))


def written(config, dtype, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tiny_model_files.make_tokenizer().save_pretrained(folder)
    return folder


def train(folder, model, data, placement, processes, **options):
    """Train with `placement`; return what the launch printed."""
    options["args"] = {"per_device_train_batch_size": 6 // processes} | options.get("args", {})
    environment = {"HF_HOME": str(folder / "cache"), VARIABLE: placement}
    arguments = [model, data, folder, json.dumps(options)]
    return launch(WORKERS / "train.py", arguments, processes, environment=environment)


def weights_of(folder, rank=0):
    return load_file(folder / f"weights{rank}.safetensors")


def assert_equal(one: dict, other: dict):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "processes"), [("dense", 3), ("experts", 2), slow("dense", 2), slow("dense", 1)])
def test_a_shared_copy_trains_as_replicas_do(kind, processes, tiny_model, experts, uneven_data, tmp_path):
    model = {"dense": tiny_model, "experts": experts}[kind]
    for placement in ("replicated", "host"):
        options = {"save": True, "evaluate": True}
        finished = train(tmp_path / placement, model, uneven_data, placement, processes, **options)
        assert finished.status == 0, finished.output[-4000:]
    replicated, shared = tmp_path / "replicated", tmp_path / "host"
    modes = [row[1] for row in result(shared)["decisions"] if row[0] == "frozen weights"]
    assert modes == ["host"]
    for rank in range(processes):  # nothing has copied them
        assert len(result(shared, rank)["shared"]) == {"dense": 14, "experts": 14}[kind]
        assert all(result(shared, rank)["shared"])
    assert result(shared)["losses"] == result(replicated)["losses"]
    assert result(shared)["eval_losses"] == result(replicated)["eval_losses"]
    for rank in range(processes):
        assert_equal(weights_of(shared, rank), weights_of(replicated, rank))
    merged = [load_file(folder / "merged" / "model.safetensors") for folder in (replicated, shared)]
    assert_equal(*merged)


@pytest.mark.parametrize(("placement", "processes"), [("host", 2), slow("replicated", 2), slow("host", 3)])
def test_the_processes_of_a_node_hold_one_copy(placement, processes, tiny_model, large_model, tmp_path):
    arguments = [tiny_model, large_model, tmp_path / "memory.json"]
    script, environment = WORKERS / "shared_weights.py", {VARIABLE: placement}
    # Forked processes share pages with their parent, which are copied one by one while they run.
    finished = launch(script, arguments, processes, environment=environment, real_launcher=True)
    assert finished.status == 0, finished.output[-4000:]
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["mode"] == placement
    assert found["model_bytes"] >= 500e6  # glibc keeps up to 64 MiB of each process
    copies = found["added_bytes"] / found["model_bytes"]
    if placement == "host":
        assert copies <= 1.25
    else:  # or this model would be shared anyway, as the pages of a file in the wanted type are
        assert copies >= 1.75


@pytest.mark.parametrize(
    ("shared", "kind", "recomputes"),
    [
        ("host", "deep", False),
        ("host", "deep", True),
        ("sharded", "deep", False),
        slow("host", "experts", False),
        slow("host", "experts", True),
        slow("sharded", "deep", True),
        slow("sharded", "experts", False),
    ],
)
def test_layers_that_are_fetched_train_as_replicas_do(
    shared, kind, recomputes, deep_model, experts, uneven_data, tmp_path
):
    """
    As on a GPU: a layer's weights are there only while it runs, in three slots for all layers.

    With `sharded` those of this rank's layers are there all the time; the memory of the other GPU is that of the machine.
    """
    model = {"deep": deep_model, "experts": experts}[kind]
    options = {"evaluate": True, "save": True, "lora": {"use_gradient_checkpointing": recomputes}}
    for placement, fetch in (("replicated", False), (shared, True)):
        finished = train(tmp_path / placement, model, uneven_data, placement, 2, fetch=fetch, **options)
        assert finished.status == 0, finished.output[-4000:]
    replicated, fetched = tmp_path / "replicated", tmp_path / shared
    assert result(fetched)["losses"] == result(replicated)["losses"]
    assert result(fetched)["eval_losses"] == result(replicated)["eval_losses"]
    assert_equal(weights_of(fetched), weights_of(replicated))
    layers_that_stay = {"host": 0, "sharded": {"deep": 3, "experts": 1}[kind]}[shared]
    for rank in (0, 1):
        found = result(fetched, rank)["shared"]
        assert len(found) == layers_that_stay * 7
        assert all(found)
    assert_equal(*[load_file(folder / "merged" / "model.safetensors") for folder in (replicated, fetched)])
    trainable = [
        [row for row in result(folder)["decisions"] if row[0] == "trainable"] for folder in (fetched, replicated)
    ]
    assert trainable[0] == trainable[1]


@pytest.mark.slow
def test_passes_with_the_adapter_switched_off_fetch_too(deep_model, preference_data, tmp_path):
    """Two forwards before a backward (DPO), two rows of a pair (reward), and the KL term's own forward (KTO)."""
    for placement, fetch in (("replicated", False), ("host", True)):
        options = {"trainers": ["dpo", "reward", "kto"], "fetch": fetch, "evaluate": True}
        options["args"] = {"per_device_train_batch_size": 3, "max_steps": 4}
        arguments = [deep_model, preference_data, tmp_path / placement, json.dumps(options)]
        (tmp_path / placement).mkdir()
        finished = launch(WORKERS / "preference.py", arguments, 2, environment={VARIABLE: placement}, timeout_s=300)
        assert finished.status == 0, finished.output[-4000:]
    for trainer in ("dpo", "reward", "kto"):
        assert_equal(*[weights_of(tmp_path / placement / trainer) for placement in ("replicated", "host")])


def test_nothing_stays_behind_a_killed_rank(tiny_model, uneven_data, tmp_path):
    before = {*Path("/dev/shm").iterdir()}
    provoke = {"what": "kill", "step": 1}
    finished = train(tmp_path, tiny_model, uneven_data, "host", 2, provoke=provoke)
    assert finished.status != 0
    assert {*Path("/dev/shm").iterdir()} <= before
    assert not mapping_processes()


def mapping_processes() -> list[str]:
    """Processes that map or hold memory of ours."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held = [os.readlink(descriptor) for descriptor in (process / "fd").iterdir()]
            if "accelerate_unsloth-" in (process / "maps").read_text() + " ".join(held):
                found.append(process.name)
    return found


def test_a_run_resumes_under_another_placement(tiny_model, uneven_data, tmp_path):
    whole = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    half = whole | {"max_steps": 2}
    assert train(tmp_path / "whole", tiny_model, uneven_data, "replicated", 2, args=whole).status == 0
    assert train(tmp_path / "other", tiny_model, uneven_data, "host", 2, args=half).status == 0
    finished = train(tmp_path / "other", tiny_model, uneven_data, "replicated", 2, args=whole, resume=True)
    assert finished.status == 0, finished.output[-4000:]
    assert_equal(weights_of(tmp_path / "other"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "placement", "message"),
    [
        ({"load": {"full_finetuning": True}}, "host", "all weights are trained"),
        ({}, "sharded", "there are no GPUs whose memory could hold parts"),
        ({"plugin": {"frozen_weights": "host"}}, "replicated", "comes too late"),
    ],
)
def test_what_is_not_possible_is_rejected_once(options, placement, message, tiny_model, uneven_data, tmp_path):
    finished = train(tmp_path, tiny_model, uneven_data, placement, 2, **options)
    assert finished.status != 0
    assert finished.output.count(message) == 1
    assert VARIABLE in finished.output


def test_4bit_and_incomplete_checkpoints_load_and_train_as_replicas_do(tiny_model, deep_model, tmp_path):
    finished = launch(WORKERS / "shared_loading.py", [tiny_model, deep_model, tmp_path], 2)
    assert finished.status == 0, finished.output[-4000:]


UNREADABLE = """
import os, sys
from accelerate_unsloth import FastLanguageModel
from accelerate_unsloth.weights.checkpoint import LayeredCheckpoint

def unreadable(self, index):
    raise OSError(f"layer {index} cannot be read")

if os.environ["RANK"] == "1":
    LayeredCheckpoint.read_layer = unreadable
FastLanguageModel.from_pretrained(sys.argv[1])
"""


def test_a_layer_that_one_rank_cannot_read_ends_all_with_one_message(tiny_model, tmp_path):
    (tmp_path / "script.py").write_text(UNREADABLE)
    finished = launch(tmp_path / "script.py", [tiny_model], 2, environment={VARIABLE: "host"}, timeout_s=60)
    assert finished.status != 0
    assert finished.output.count("OSError: layer 1 cannot be read") == 1


OTHERWISE = """
import os, sys
from accelerate_unsloth.launch import channel
channel._LOOK_EVERY_S = 0.1
os.environ["ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"] = ["host", "replicated"][int(os.environ["RANK"])]
from accelerate_unsloth import FastLanguageModel
FastLanguageModel.from_pretrained(sys.argv[1])
channel.channel().gather("settings", 0)
"""


def test_ranks_that_decide_differently_end_with_both_calls_named(tiny_model, tmp_path):
    (tmp_path / "script.py").write_text(OTHERWISE)
    finished = launch(tmp_path / "script.py", [tiny_model], 2, timeout_s=60)
    assert finished.status != 0
    assert "frozen weights loaded" in finished.output
    assert "that one for it in 'settings'" in finished.output or "in 'settings', and that one" in finished.output
