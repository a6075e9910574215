"""What must not leak, and what others may read."""

import json
import os
import stat
from types import SimpleNamespace

import pytest

from accelerate_unsloth import agreement, saving


@pytest.fixture
def trainer(tiny_model, monkeypatch):
    """What `agreement.describe` looks at, with a hub token in the arguments and in the environment."""
    import datasets
    from transformers import AutoModelForCausalLM

    from accelerate_unsloth import SFTConfig, UnslothPlugin

    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    return SimpleNamespace(
        args=SFTConfig("out", hub_token="hf_secret_of_the_arguments", use_cpu=True, bf16=False, report_to="none"),
        plugin=UnslothPlugin(),
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}),
    )


def test_no_secret_is_in_what_ranks_compare(trainer):
    assert "secret" not in json.dumps(agreement.describe(trainer))


def test_the_comparison_covers_versions_arguments_options_model_and_data(trainer):
    described = agreement.describe(trainer)
    for entry in (
        "version of torch",
        "argument learning_rate",
        "argument seed",
        "argument output_dir",
        "plugin option gradient_sync",
        "model configuration",
        "names, shapes and types of trainable tensors",
        "samples of the training data set",
    ):
        assert entry in described


def test_each_difference_is_named_with_ranks_and_values():
    same = {"argument seed": "1", "samples of the training data set": 8}
    lines = agreement.differences([same, same | {"argument seed": "2"}, same])
    assert lines == ["argument seed: 1 on ranks 0, 2; 2 on rank 1"]
    assert agreement.differences([same, same]) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_weights_follow_the_umask(umask, mode, tmp_path):
    import torch
    from safetensors.torch import save_file

    earlier = os.umask(umask)
    try:
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
        saving.follow_umask(tmp_path)
        assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode
        os.umask(umask)
    finally:
        assert os.umask(earlier) == umask  # looking at it has not changed it


def test_code_from_the_hub_stays_off_unless_asked_for():
    import inspect

    from accelerate_unsloth.engines import reference

    parameters = inspect.signature(reference.FastLanguageModel.from_pretrained).parameters
    assert parameters["trust_remote_code"].default is False
