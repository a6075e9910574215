"""What must not leak, and what others may read."""

import ast
import json
import os
import pickle
import shutil
import stat
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

from accelerate_unsloth.reliability import agreement, rank0_writes

from ..launching import ROOT


@pytest.fixture
def trainer(tiny_model, monkeypatch):
    """What `agreement.describe` looks at, with a hub token in the arguments and in the environment."""
    from transformers import AutoModelForCausalLM

    from accelerate_unsloth import SFTConfig, UnslothPlugin

    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    return SimpleNamespace(
        args=SFTConfig("out", hub_token="hf_secret_of_the_arguments", use_cpu=True, bf16=False, report_to="none"),
        plugin=UnslothPlugin(),
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[1, 2], [3], [4]], "labels": [[1, 2], [3], [4]]}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": [[1], [2]]}),
        _signature_columns=["input_ids", "labels"],
        _set_signature_columns_if_needed=lambda: None,
    )


def test_no_secret_is_in_what_ranks_compare(trainer):
    trainer.args.model_init_kwargs = {
        "token": "hf_secret_inside",
        "deeper": [{"api_key": "secret"}],
        "revision": "main",
    }
    described = json.dumps(agreement.describe(trainer))
    assert "secret" not in described
    assert "'revision': 'main'" in described


def test_no_secret_is_in_what_is_said_of_a_difference(monkeypatch):
    monkeypatch.setenv("STORAGE_TOKEN", "of-the-first-rank")
    values = ("s3://rows?of-the-first-rank", "https://me:of-the-other@host/rows")
    said = agreement.differences([{"argument data": value} for value in values])
    assert said == ["argument data: s3://rows?HIDDEN on rank 0; https://HIDDEN@host/rows on rank 1"]


def change_weight(trainer, **how):
    name, weight = next(iter(trainer.model.named_parameters()))
    trainer.model.register_parameter(name.replace(".", "_"), torch.nn.Parameter(weight.detach().to(**how)))


def other_tokens(column):
    def change(trainer):
        rows = trainer.train_dataset.to_dict()
        rows[column][1] = [9]  # neither the first nor the last, and no longer or shorter
        trainer.train_dataset = datasets.Dataset.from_dict(rows)

    return change


# What must be equal on all ranks, and a change of it on one of them.
CHANGES = {
    "argument seed": lambda trainer: setattr(trainer.args, "seed", 1),
    "argument learning_rate": lambda trainer: setattr(trainer.args, "learning_rate", 0.5),
    "argument model_init_kwargs": lambda trainer: setattr(trainer.args, "model_init_kwargs", {"revision": "other"}),
    "plugin option micro_batch": lambda trainer: setattr(trainer.plugin, "micro_batch", "fixed"),
    "model configuration rms_norm_eps": lambda trainer: setattr(trainer.model.config, "rms_norm_eps", 0.5),
    "model configuration rope_parameters rope_theta": lambda trainer: trainer.model.config.rope_parameters.update(
        rope_theta=5.0
    ),
    "number of trainable tensors": change_weight,
    "names, shapes and types of trainable tensors": lambda trainer: trainer.model.to(torch.float64),
    "samples of the training dataset": lambda trainer: setattr(
        trainer, "train_dataset", trainer.train_dataset.select([0, 1])
    ),
    "lengths of the training dataset": lambda trainer: setattr(
        trainer, "train_dataset", trainer.train_dataset.select([1, 0, 2])
    ),
    "contents of the training dataset": other_tokens("labels"),
    "samples of the evaluation dataset": lambda trainer: setattr(
        trainer, "eval_dataset", trainer.eval_dataset.select([0])
    ),
    "samples of the evaluation one dataset": lambda trainer: setattr(
        trainer, "eval_dataset", {"one": trainer.eval_dataset}
    ),
}


@pytest.mark.parametrize("entry", CHANGES)
def test_what_must_be_equal_is_compared(entry, trainer):
    before = agreement.describe(trainer)
    CHANGES[entry](trainer)
    assert any(line.startswith(f"{entry}: ") for line in agreement.differences([before, agreement.describe(trainer)]))


@pytest.mark.parametrize("library", ["accelerate", "datasets", "peft", "torch", "transformers", "trl", "unsloth"])
def test_versions_of_the_libraries_are_compared(library, trainer, monkeypatch):
    before = agreement.describe(trainer)
    monkeypatch.setattr(agreement, "version", lambda name: "0.0" if name == library else metadata.version(name))
    (line,) = agreement.differences([before, agreement.describe(trainer)])
    assert line == f"version of {library}: {metadata.version(library)} on rank 0; 0.0 on rank 1"


def test_a_difference_of_the_model_configuration_is_named_with_its_values(trainer):
    before = agreement.describe(trainer)
    trainer.model.config.hidden_act = "gelu"
    (line,) = agreement.differences([before, agreement.describe(trainer)])
    assert line == "model configuration hidden_act: 'silu' on rank 0; 'gelu' on rank 1"


def test_a_long_value_of_the_model_configuration_is_compared_by_its_digest(trainer):
    described = []
    for last in (0, 1):
        trainer.model.config.layer_types = ["full_attention"] * 99 + [f"of rank {last}"]
        described.append(agreement.describe(trainer))
    (line,) = agreement.differences(described)
    assert line.startswith("model configuration layer_types: digest ")
    assert len(line) < 120


def test_the_same_model_in_another_folder_is_no_difference(trainer, tiny_model, tmp_path):
    """As on machines that keep their models in different places."""
    from transformers import AutoModelForCausalLM

    before = agreement.describe(trainer)
    shutil.copytree(tiny_model, tmp_path / "copy")
    trainer.model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert agreement.differences([before, agreement.describe(trainer)]) == []


def test_a_column_that_training_does_not_read_is_no_difference(trainer):
    described = []
    for name in ("a", "b"):
        trainer.train_dataset = trainer.train_dataset.add_column(f"id of {name}", [name] * 3)
        described.append(agreement.describe(trainer))
    assert agreement.differences(described) == []


def test_equal_data_in_another_place_is_no_difference(trainer, tmp_path):
    """As on machines that share no disk: other files, another fingerprint."""
    before = agreement.describe(trainer)
    trainer.train_dataset.save_to_disk(tmp_path)
    trainer.train_dataset = datasets.load_from_disk(tmp_path)
    trainer.train_dataset._fingerprint = "another"
    assert agreement.differences([before, agreement.describe(trainer)]) == []


def test_each_difference_is_named_with_ranks_and_values():
    same = {"argument seed": "1", "samples of the training dataset": 8}
    lines = agreement.differences([same, same | {"argument seed": "2"}, same])
    assert lines == ["argument seed: 1 on ranks 0, 2; 2 on rank 1"]
    assert agreement.differences([same, same]) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_weights_follow_the_umask(umask, mode, tmp_path):
    from safetensors.torch import save_file

    earlier = os.umask(umask)
    try:
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
        rank0_writes.follow_umask(tmp_path)
        assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode
        os.umask(umask)
    finally:
        assert os.umask(earlier) == umask  # looking at it has not changed it


def test_code_from_the_hub_stays_off_unless_asked_for(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    from accelerate_unsloth.engines import reference

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, marker = tmp_path / "model", tmp_path / "was_run"
    model.mkdir()
    (model / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(marker)!r}).touch()\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    )
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        reference.FastLanguageModel.from_pretrained(str(model))
    assert not marker.exists()
    with pytest.raises(ValueError, match="Own"):  # no model for it, but its code has been asked for
        reference.FastLanguageModel.from_pretrained(str(model), trust_remote_code=True)
    assert marker.exists()


class Touch:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def train(tiny_model, tmp_path_factory):
    """One step of training, as `train(resume_from_checkpoint)`; and the checkpoint that the first call has left."""
    from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer

    folder = tmp_path_factory.mktemp("run")

    def train(checkpoint=None, steps=1):
        model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model), max_seq_length=64)
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
        arguments = {"max_steps": steps, "save_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
        rows = datasets.Dataset.from_list([{"prompt": "a rank ", "completion": "sends"}] * 16)
        arguments = SFTConfig(str(folder), **arguments)
        SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train(checkpoint)

    train()
    return train, folder / "checkpoint-1"


# Files of a checkpoint that may be pickled, and the one that is taken away for it.
PICKLED = {
    "optimizer.pt": "",
    "scheduler.pt": "",
    "rng_state.pth": "",
    "adapter_model.bin": "adapter_model.safetensors",
}


@pytest.mark.parametrize("name", PICKLED)
def test_a_checkpoint_runs_no_code_when_it_is_loaded(name, train, tmp_path):
    train, checkpoint = train
    poisoned, marker = tmp_path / checkpoint.name, tmp_path / "was_run"
    shutil.copytree(checkpoint, poisoned)
    if PICKLED[name]:
        (poisoned / PICKLED[name]).unlink()
    torch.save(Touch(marker), poisoned / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(str(poisoned), steps=2)
    assert not marker.exists()
    torch.load(poisoned / name, weights_only=False)
    assert marker.exists()  # it would have


def test_nothing_of_ours_unpickles():
    """By a look at every import and call of the package."""
    unpicklers = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    guards = {"np.load": "allow_pickle=False", "torch.load": "weights_only=True"}
    for file in (ROOT / "accelerate_unsloth").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                named = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not unpicklers & named, file
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in guards:
                assert guards[ast.unparse(node.func)] in ast.unparse(node), file
