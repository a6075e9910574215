"""The sizes of models, compared with their parameters."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP
from typer.testing import CliRunner

from accelerate_unsloth import ConfigManager
from accelerate_unsloth.commands import app
from accelerate_unsloth.memory import model_shape, model_sizes
from accelerate_unsloth.memory.budget import ModelShape
from accelerate_unsloth.memory.estimate import EXPERTS_NOTE, estimate

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, **ROUTED}

# Options, and the width that one token uses in the widest layer.
KNOWN = {
    "llama": ({}, 128),
    "phi3": ({}, 128),
    "gemma3_text": ({}, 128),
    "mixtral": ({}, 256),
    "phimoe": ({}, 256),
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 2}, 256),
    "gpt_oss": ({"num_local_experts": 8, "num_experts_per_tok": 2}, 256),
    "qwen3_moe": ({"num_experts": 8, **ROUTED}, 64),
    "qwen2_moe": (
        {
            "num_experts": 8,
            **ROUTED,
            "shared_expert_intermediate_size": 96,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        128 + 32,
    ),
    "glm4_moe": ({**DEEPSEEK}, 128),
    "dots1": ({**DEEPSEEK, "n_shared_experts": 4}, 2 * 32 + 4 * 32),
    "granitemoe": ({}, 256),
    "granitemoeshared": ({"shared_intermediate_size": 64}, 256 + 64),
    "granitemoehybrid": (
        {"num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["attention"] * 4, "mamba_n_heads": 8},
        64,
    ),
    "ernie4_5_moe": (
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
        128,
    ),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2}, 2 * 128 + 128),
    "aria_text": ({"moe_num_experts": 8, "moe_topk": 3, "moe_num_shared_experts": 2}, 3 * 128 + 2 * 128),
    "llama4_text": (
        {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
        128 + 128,
    ),
    "solar_open": ({"n_routed_experts": 8, "n_shared_experts": 1, **ROUTED}, 2 * 32 + 32),
}

# Options, and a part of the layer or decoder that a shape cannot describe.
UNKNOWN = {
    "deepseek_v2": (DEEPSEEK, "self_attn.q_a_proj"),
    "deepseek_v3": (DEEPSEEK, "self_attn.q_a_proj"),
    "doge": ({"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}, "mlp.down_embed"),
    "jamba": ({}, "mamba.in_proj"),
    "nemotron_h": ({}, "mixer.in_proj"),
    "longcat_flash": ({}, "56 layers"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "conv.in_proj"),
    "lfm2_moe": ({"num_experts": 8, **ROUTED, "layer_types": ["conv", "full_attention"] * 2}, "conv.in_proj"),
    "qwen3_next": ({}, "linear_attn"),
    "qwen3_5_text": ({}, "linear_attn"),
    "minimax": ({}, "layer 1 .* self_attn.qkv_proj"),
    "bamba": ({}, "mamba"),
    "falcon_h1": ({}, "mamba"),
    "mamba": ({}, "mixer.in_proj"),
    "starcoder2": ({}, "mlp.c_fc, mlp.c_proj"),  # an MLP without a gate
    "gpt2": ({}, "wpe"),
    "gemma3n_text": (None, "embed_tokens_per_layer"),
    "gemma4_text": (None, "head_dim"),
}


def config_of(model_type, changes):
    return CONFIG_MAPPING[model_type](**({} if changes is None else {**SMALL, **changes}))


def built(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameters_of(model) -> int:
    """Count the parameters of the language part, shared ones once."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    return sum({id(p): p.numel() for part in parts if part for p in part.parameters()}.values())


def counted(shape: ModelShape) -> int:
    return shape.stored_linear_values + shape.embedding_values


@pytest.mark.parametrize("model_type", KNOWN)
def test_the_weights_are_those_of_the_model(model_type):
    changes, intermediate = KNOWN[model_type]
    config = config_of(model_type, changes)
    shape = model_shape.read_config(config)
    assert counted(shape) == pytest.approx(parameters_of(built(config)), rel=0.02)
    assert shape.intermediate == intermediate
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (64, 4, 4, 2, 16)


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_model_of_other_layers_is_unknown_and_the_reason_names_them(model_type):
    changes, part = UNKNOWN[model_type]
    with pytest.raises(ValueError, match=f"is unknown: .*{part}.* nothing is planned"):
        model_sizes.from_config(config_of(model_type, changes))


# In billions, from the model cards.
PUBLISHED = {
    "Mixtral-8x7B": ("mixtral", {}, 46.7),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20.9),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
        },
        30.5,
    ),
    "Qwen2-57B-A14B": (
        "qwen2_moe",
        {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
        },
        57.4,
    ),
    # 106 with the layer that predicts further tokens, which transformers does not load.
    "GLM-4.5-Air": ("glm4_moe", {"num_attention_heads": 96, "vocab_size": 151552}, 103.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_with_experts_have_the_published_number_of_parameters(name):
    model_type, sizes, billions = PUBLISHED[name]
    assert counted(model_shape.read_config(CONFIG_MAPPING[model_type](**sizes))) == pytest.approx(
        1e9 * billions, rel=0.01
    )


# These have no default config.
EVERY_TYPE = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
EVERY_TYPE -= {"musicgen", "musicgen_melody", "vision-encoder-decoder"}


@pytest.mark.slow
def test_no_language_model_of_transformers_is_silently_wrong():
    transformers.logging.set_verbosity_error()
    known = [count for model_type in sorted(EVERY_TYPE) if (count := counted_twice(model_type))]
    assert len(known) > 75
    assert [count for count in known if count[1] != pytest.approx(count[2], rel=0.01)] == []


def counted_twice(model_type):
    """Return the weights by shape and by model of a default config, or `None` if the shape is unknown."""
    try:
        model = model_shape.on_meta_device(CONFIG_MAPPING[model_type]())
        return model_type, counted(model_shape.read(model)), parameters_of(model)
    except model_shape.UnknownStructure:
        return None


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITH_ADAPTERS = {"llama": {}, "qwen3_moe": {"target_parameters": EXPERTS}}


@pytest.mark.parametrize("model_type", WITH_ADAPTERS)
def test_adapters_are_those_that_peft_makes(model_type):
    config = config_of(model_type, KNOWN[model_type][0])
    shape = model_shape.read_config(config)
    model = get_peft_model(built(config), LoraConfig(r=4, target_modules=LINEAR, **WITH_ADAPTERS[model_type]))
    assert shape.lora_values(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", WITH_ADAPTERS)
def test_a_loaded_model_has_the_same_shape_with_adapters_trained_embeddings_and_in_4_bits(model_type):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = config_of(model_type, KNOWN[model_type][0])
    model = AutoModelForCausalLM.from_config(config)

    def packed(weight):
        return bitsandbytes.nn.Params4bit(weight.data, requires_grad=False).to("cpu")

    for path, module in [*model.model.layers.named_modules()]:
        if isinstance(module, torch.nn.Linear):
            linear = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False)
            linear.weight = packed(module.weight)
            model.model.layers.set_submodule(path, linear)
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight.dim() == 3:
                setattr(module, name, packed(weight))
    assert all(weight.dtype == torch.uint8 for name, weight in model.named_parameters() if name.endswith("_proj"))
    assert model_shape.shape_of(model) == model_shape.read_config(config)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR[:4], modules_to_save=["embed_tokens"]))
    assert model_shape.shape_of(adapted) == model_shape.read_config(config)


def test_experts_in_a_module_list_are_experts():
    """As in code that comes with a model, and as Unsloth loads some of them in 4 bits."""
    config = config_of("qwen3_moe", KNOWN["qwen3_moe"][0])
    model, stacked = built(config), model_shape.read_config(config)
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(Qwen3MoeMLP(config, 32) for _ in range(8))
    listed = model_shape.shape_of(model)
    assert (listed.intermediate, listed.stored_linear_values) == (stacked.intermediate, stacked.stored_linear_values)


def test_a_loaded_model_of_other_layers_has_no_shape():
    assert model_shape.shape_of(built(config_of("falcon_h1", {}))) is None
    twice = built(config_of("llama", {}))
    twice.model.layers[1].cross_attn = copy.deepcopy(twice.model.layers[1].self_attn)
    assert model_shape.shape_of(twice) is None


def test_reading_a_config_does_not_change_it():
    config = config_of("llama", {})
    before, kernel = config.to_dict(), config._attn_implementation
    model_shape.read_config(config)
    assert (config.to_dict(), config._attn_implementation) == (before, kernel)


def test_idle_experts_take_weights_and_adapters_but_no_time_of_a_token():
    two, all_of_eight = (
        model_shape.read_config(config_of("qwen3_moe", {"num_experts": 8, **ROUTED, "num_experts_per_tok": active}))
        for active in (2, 8)
    )
    assert counted(two) == counted(all_of_eight)
    assert two.lora_values(16) == all_of_eight.lora_values(16)
    assert two.working_bytes < all_of_eight.working_bytes
    assert estimate(two).weights_gib == estimate(all_of_eight).weights_gib


# ---- What users see ----


def estimate_memory(folder, config, *words):
    (folder / "config.json").write_text(json.dumps(config if isinstance(config, dict) else config.to_dict()))
    return CliRunner().invoke(app, ["estimate-memory", str(folder), *words])


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_command_reports_why_a_model_is_unknown_and_what_to_do(tmp_path, words):
    answer = estimate_memory(tmp_path, config_of("jamba", {}), *words)
    assert answer.exit_code == 2
    assert answer.stdout == ""
    for part in ("JambaConfig is unknown", "mamba.in_proj", "Give a size", "micro_batch_tokens"):
        assert part in answer.stderr


def test_the_command_and_the_options_say_that_experts_were_not_measured(tmp_path):
    config = config_of("qwen3_moe", KNOWN["qwen3_moe"][0])
    answer = estimate_memory(tmp_path, config)
    assert answer.exit_code == 0, answer.output
    assert EXPERTS_NOTE in " ".join(answer.stdout.split())
    assert not json.loads(estimate_memory(tmp_path, config, "--json").stdout)[0]["activations_measured"]
    assert ConfigManager().get_optimal_config(config, "8GB", 1).assumptions["experts"] == EXPERTS_NOTE
    dense = config_of("llama", {})
    assert "experts" not in estimate_memory(tmp_path, dense).stdout
    assert "experts" not in ConfigManager().get_optimal_config(dense, "8GB", 1).assumptions


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'was_run')!r}).touch()\n")
    own = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    answer = estimate_memory(tmp_path, {"model_type": "own", **own})
    assert answer.exit_code == 2
    assert "is unknown: its config is code that comes with the model" in answer.stderr
    builtin = estimate_memory(tmp_path, {**config_of("llama", {}).to_dict(), **own})  # transformers has its own code
    assert builtin.exit_code == 0, builtin.output
    assert not (tmp_path / "was_run").exists()


def test_a_config_class_that_transformers_has_no_model_for_is_unknown():
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    with pytest.raises(ValueError, match="OwnConfig is unknown: transformers has no language model for it"):
        model_sizes.from_config(OwnConfig())
