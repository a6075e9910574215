"""Configurations for `enable_multi_gpu`: that they fit by the arithmetic, are taken, and survive a file."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from transformers import AutoConfig

import accelerate_unsloth
from accelerate_unsloth import ConfigManager, DeviceManager, UnslothPlugin, enable_multi_gpu
from accelerate_unsloth.devices.nvml import Gpu
from accelerate_unsloth.memory import model_shape, model_sizes
from accelerate_unsloth.memory.budget import ModelShape
from accelerate_unsloth.memory.estimate import estimate

from ..launching import ROOT, clean_environment, launch
from .test_devices import Table

LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
TEMPLATES = ["one_small_gpu", "two_t4_fp16", "four_24gb", "eight_80gb", "cpu_dry_run"]

manager = ConfigManager()


@pytest.fixture(autouse=True)
def disabled_afterwards():
    yield
    accelerate_unsloth.disable_multi_gpu()


def run(code, *arguments, environment=None):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(environment), cwd=ROOT)


# ---- The sizes ----

# As the models' cards give them; without norms and biases, which are less than a thousandth.
PUBLISHED_PARAMETERS = {
    "135M": 134_515_008,
    "0.5B": 494_032_768,
    "1B": 1_235_814_400,
    "1.5B": 1_543_714_304,
    "3B": 3_212_749_824,
    "7B": 7_615_616_512,
    "8B": 8_030_261_248,
    "13B": 13_015_864_320,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "70B": 70_553_706_496,
    "72B": 72_706_203_648,
}


@pytest.mark.parametrize("size", model_sizes.KNOWN)
def test_the_dims_of_a_size_have_the_published_number_of_parameters(size):
    shape = model_sizes.resolve(size).shape
    assert shape.stored_linear_values + shape.embedding_values == pytest.approx(PUBLISHED_PARAMETERS[size], rel=1e-3)
    assert shape.head_dim * shape.heads == shape.hidden


def test_a_size_is_found_however_it_is_written_and_says_whose_dims_it_has():
    assert model_sizes.resolve(" 8 b").shape == LLAMA_8B
    assert model_sizes.resolve("8B").source == "8B, with the dims of Llama-3.1-8B"


@pytest.mark.parametrize("size", ["6B", "7", "7.B"])
def test_a_size_that_is_not_in_the_table_is_rejected_with_those_that_are(size):
    with pytest.raises(
        ValueError, match=r"not in the table of published sizes.*0\.5B, 1B.*hub id, a folder or a config"
    ):
        model_sizes.resolve(size)


def test_a_folder_a_config_and_a_shape_give_the_same_sizes(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    shape = ModelShape(32, 64, 2, 4, 2, 8, config.vocab_size)
    assert (
        model_sizes.resolve(tiny_model).shape
        == model_sizes.resolve(config).shape
        == model_sizes.resolve(shape).shape
        == shape
    )
    assert model_sizes.resolve(config).source == "the LlamaConfig that was given"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 32}, {"tie_word_embeddings": True}])
def test_a_dense_model_has_the_same_sizes_without_transformers(model_type, changes, tmp_path, monkeypatch):
    written = {
        "model_type": model_type, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, **changes,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    expected = model_shape.read_config(AutoConfig.from_pretrained(tmp_path))
    monkeypatch.setattr(model_sizes, "from_config", None)
    assert model_sizes.resolve(tmp_path).shape == expected


BEFORE_TRANSFORMERS = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "transformers":
            print("accelerate_unsloth.engines.select" in sys.modules, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
from accelerate_unsloth import ConfigManager
ConfigManager().get_optimal_config(sys.argv[1], "80GB", 1)
"""


def test_the_engine_is_loaded_before_transformers_where_a_model_needs_it(tmp_path):
    """Unsloth has to be imported first."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    finished = run(BEFORE_TRANSFORMERS, tmp_path)
    assert finished.stdout == "True\n", finished.stderr


SHAPE_OF = """
import json, sys
from dataclasses import asdict
from accelerate_unsloth.memory import model_shape, model_sizes
shape = model_sizes.resolve(sys.argv[1]).shape
assert "transformers" not in sys.modules and "torch" not in sys.modules
print(json.dumps(asdict(shape)))
"""


@pytest.mark.launch
def test_a_hub_id_of_the_local_cache_is_read_without_importing_transformers(tiny_model, tmp_path):
    """Unsloth has to be imported before it."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "config.json").write_text((tiny_model / "config.json").read_text())
    finished = run(SHAPE_OF, "someone/tiny", environment={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert finished.returncode == 0, finished.stderr
    assert ModelShape(**json.loads(finished.stdout)) == model_sizes.resolve(tiny_model).shape
    absent = run(SHAPE_OF, "someone/else", environment={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert "ValueError: The config of 'someone/else' could not be read" in absent.stderr


def test_a_config_without_such_sizes_is_named():
    from transformers import T5Config

    with pytest.raises(ValueError, match="memory of T5Config is unknown"):
        manager.get_optimal_config(T5Config(), "8GB", 1)


# ---- The memory ----


@pytest.mark.parametrize(
    ("amount", "gib"),
    [("32GB", 32e9 / 2**30), (" 80 gb ", 80e9 / 2**30), ("24GiB", 24), ("9216MiB", 9), ("22.5 GiB", 22.5), (24, 24)],
)
def test_memory_is_read_as_it_is_written(amount, gib):
    assert f"which is {gib:.1f} GiB" in manager.get_optimal_config("1B", amount, 1).assumptions["memory"]


@pytest.mark.parametrize("amount", ["", "32", "32GBs", "-1GB", "0GB", 0, -3, True, float("nan"), float("inf"), [24]])
def test_what_is_no_amount_of_memory_is_rejected_with_how_to_write_it(amount):
    with pytest.raises(ValueError, match=r"available_memory=.* is not an amount of memory above 0.*'24GB'"):
        manager.get_optimal_config("1B", amount, 1)


# ---- The options ----


def test_a_micro_batch_is_the_largest_that_estimate_memory_would_allow():
    config = manager.get_optimal_config("8B", "24GiB", num_gpus=2, max_seq_length=4096, r=64, optim="adamw_torch")
    held = estimate(LLAMA_8B, True, 64, "adamw_torch", num_gpus=2)
    layers = int(re.match(r"recomputed in (\d+) of 32 layers", config.assumptions["activations"])[1])
    left_bytes = (24 * 0.9 - held.resting_gib) * 2**30
    assert config["plugin"].micro_batch_tokens == LLAMA_8B.tokens_within(left_bytes, layers / 32)
    assert config["num_gpus"] == 2
    assert set(config) == {"num_gpus", "enable_gradient_checkpointing", "plugin"}


def test_activations_are_recomputed_where_they_do_not_fit_and_kept_where_they_do():
    small, medium, large = (manager.get_optimal_config("8B", memory, 1) for memory in ("9.3GB", "16GB", "140GB"))
    chosen = [config["enable_gradient_checkpointing"] for config in (small, medium, large)]
    assert chosen == [True, True, False]
    assert small.assumptions["activations"].startswith("recomputed, for steps of 8 full samples")
    assert medium.assumptions["activations"].startswith("recomputed in 19 of 32 layers, for steps of 8 full samples")
    assert large.assumptions["activations"].startswith("kept")
    kept = estimate(LLAMA_8B, checkpointing=False).largest_micro_batch(140e9 / 2**30)
    assert large["plugin"].micro_batch_tokens == kept


def test_the_memory_fraction_of_the_environment_is_used_and_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MEMORY_FRACTION", "0.5")
    config = manager.get_optimal_config("1B", 20, 1)
    shape = model_sizes.resolve("1B").shape
    held = estimate(shape, checkpointing=config["enable_gradient_checkpointing"])
    assert config["plugin"].micro_batch_tokens == held.largest_micro_batch(20, 0.5)
    assert "0.5 of it may be used" in config.assumptions["memory"]


@pytest.mark.parametrize(
    ("variables", "checkpointing", "tokens", "said"),
    [
        (
            {"GRADIENT_CHECKPOINTING": "unsloth"},
            True,
            "recomputed",
            "recomputed, for steps of 8 full samples per process: asked",
        ),
        (
            {"GRADIENT_CHECKPOINTING": "none"},
            False,
            "kept",
            "kept, for steps of 8 full samples per process: asked for",
        ),
        ({"MICRO_BATCH": "fixed"}, None, None, "as the script splits them: asked for; up to "),
        ({"MICRO_BATCH": "fixed", "MICRO_BATCH_TOKENS": "4096"}, None, None, "as the script says, for steps"),
        ({"MICRO_BATCH_TOKENS": "4096"}, False, 4096, "at most 4,096 tokens, 2 full samples"),
    ],
)
def test_what_the_environment_asks_for_is_obeyed(variables, checkpointing, tokens, said, monkeypatch, tmp_path):
    fits = {mode: fitting(mode == "recomputed") for mode in ("kept", "recomputed")}
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_UNSLOTH_{name}", value)
    manager = ConfigManager()
    config = manager.get_optimal_config("7B", available_memory="80GB", num_gpus=4)
    assert config.get("enable_gradient_checkpointing") is checkpointing
    assert config["plugin"].micro_batch_tokens == fits.get(tokens, tokens)
    assert said in config.explain()
    assert manager.validate(config) == []
    manager.save(config, tmp_path / "config.yaml")
    assert manager.load(tmp_path / "config.yaml") == dict(config)


def fitting(recompute):
    """Tokens of the largest micro-batch of a 7B model on each of 4 GPUs of 80 GB."""
    shape, gpu_gib = model_sizes.resolve("7B").shape, 80e9 / 2**30
    return estimate(shape, checkpointing=recompute, num_gpus=4).largest_micro_batch(gpu_gib)


def test_what_fits_only_with_recomputation_is_rejected_where_that_is_ruled_out(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING", "none")
    with pytest.raises(ValueError, match=r"tokens, kept\. .* To make it fit, let activations be recomputed"):
        ConfigManager().get_optimal_config("8B", available_memory="10GB", num_gpus=1)


def test_templates_are_the_same_under_any_environment(monkeypatch):
    plain = ConfigManager().templates()
    options = {"GRADIENT_CHECKPOINTING": "none", "MICRO_BATCH": "fixed", "MEMORY_FRACTION": "0.1", "MONITOR": "0"}
    options |= {"WATCHDOG_TIMEOUT_S": "1", "MICRO_BATCH_TOKENS": "4096"}  # which are None by default
    for name, value in options.items():
        monkeypatch.setenv(f"ACCELERATE_UNSLOTH_{name}", value)
    assert ConfigManager().templates() == plain
    assert all(ConfigManager().validate(config) == [] for config in plain.values())


def test_every_assumption_is_said():
    config = manager.get_optimal_config("13B", "48 GB", 3, max_seq_length=1024, load_in_4bit=False, r=8, optim="sgd")
    assert config.assumptions["model"] == "13B, with the dims of Llama-2-13B"
    script = "load_in_4bit=False, max_seq_length=1024, r=8 on all linear layers, optim='sgd'"
    assert config.assumptions["script"] == script
    assert config.assumptions["memory"] == "48 GB, which is 44.7 GiB, of each GPU; 0.9 of it may be used"
    assert config.assumptions["processes"] == "3, as asked for"
    tokens = config["plugin"].micro_batch_tokens
    assert f"at most {tokens:,} tokens, {tokens // 1024} full samples" in config.assumptions["micro-batches"]
    assert config.explain().splitlines()[0] == "model: 13B, with the dims of Llama-2-13B"
    assert len(config.explain().splitlines()) == len(config.assumptions)


def test_what_does_not_fit_is_rejected_with_the_arithmetic_and_what_would(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_FROZEN_WEIGHTS", "replicated")
    with pytest.raises(ValueError, match=r"does not fit 14\.9 GiB.*0\.9 of the memory is 13\.41") as caught:
        manager.get_optimal_config("8B", "16GB", 2, load_in_4bit=False)
    held = estimate(LLAMA_8B, load_in_4bit=False, num_gpus=2)
    assert f"{held.weights_gib:.2f} weights" in str(caught.value)
    assert f"That is {held.peak_gib(2048):.2f}," in str(caught.value)
    assert "set load_in_4bit=True, choose a smaller model or use GPUs of at least" in str(caught.value)
    enough = float(str(caught.value).split("at least ")[1].split(" GiB")[0]) + 0.1
    assert manager.get_optimal_config("8B", enough, 2, load_in_4bit=False)
    with pytest.raises(ValueError, match="does not fit"):
        manager.get_optimal_config("8B", enough - 0.3, 2, load_in_4bit=False)


@pytest.mark.parametrize(
    ("num_gpus", "memory", "mode"),
    [(1, "80GB", "replicated"), (1, "24GB", "host"), (2, "24GB", "host"), (4, "24GB", "sharded")],
)
def test_weights_are_shared_where_they_leave_no_room(num_gpus, memory, mode):
    config = manager.get_optimal_config("70B", memory, num_gpus)
    assert config.assumptions["frozen weights"].startswith(f"{mode}: ")
    assert config["plugin"].micro_batch_tokens >= 2048


def test_a_model_that_fits_nowhere_is_rejected():
    with pytest.raises(
        ValueError, match=r"70B, .* in 16 bits: The model does not fit this machine: .* which has 5\.6 GiB"
    ):
        manager.get_optimal_config("70B", "6GB", 2, load_in_4bit=False)


def test_a_fix_is_only_named_where_it_helps(monkeypatch):
    with pytest.raises(ValueError, match="does not fit") as caught:
        manager.get_optimal_config("8B", "12GB", 1, max_seq_length=60_000)
    most = int(re.search(r"at most ([\d,]*\d)", str(caught.value))[1].replace(",", ""))
    assert "load_in_4bit" not in str(caught.value)
    assert manager.get_optimal_config("8B", "12GB", 1, max_seq_length=most)
    with pytest.raises(ValueError, match="does not fit"):
        manager.get_optimal_config("8B", "12GB", 1, max_seq_length=most + 1)
    monkeypatch.setenv("ACCELERATE_UNSLOTH_FROZEN_WEIGHTS", "replicated")
    with pytest.raises(
        ValueError, match=r"recomputed\. That is [\d.]+, and .* To make it fit, choose a smaller model"
    ):
        manager.get_optimal_config("70B", "24GB", 8)


@pytest.mark.parametrize(
    "wrong", [{"num_gpus": 0}, {"num_gpus": True}, {"max_seq_length": 2.5}, {"r": 0}, {"max_seq_length": None}]
)
def test_what_is_no_number_is_rejected_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}=.* is not a whole number of at least 1"):
        manager.get_optimal_config("1B", "24GB", **wrong)


# ---- What is read here ----


def on_gpus(*total_gib, **table):
    gpus = tuple(Gpu(i, f"GPU-{i}", "RTX 4090", total, (8, 9)) for i, total in enumerate(total_gib))
    return ConfigManager(DeviceManager(Table(gpus=gpus, free_gib=(1.0,) * len(gpus), **table), {}))


def test_memory_and_number_are_those_of_the_visible_gpus():
    config = on_gpus(48.0, 24.0, 80.0).get_optimal_config("8B")
    assert config["num_gpus"] == 3
    assert config.assumptions["processes"] == "3, one for each visible GPU"
    assert config.assumptions["memory"] == "24.0 GiB, the total of cuda:1 (RTX 4090); 0.9 of it may be used"
    assert config == manager.get_optimal_config("8B", 24, 3)


def test_a_launch_takes_the_first_gpus():
    assert on_gpus(48.0, 24.0).get_optimal_config("8B", num_gpus=1) == manager.get_optimal_config("8B", 48, 1)


def test_in_a_launch_the_processes_are_those_of_the_launch(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    config = on_gpus(*[24.0] * 8).get_optimal_config("8B")
    assert config["num_gpus"] == 16
    assert config.assumptions["processes"] == "16, those of this launch"


def test_without_a_gpu_the_number_stays_open_and_the_memory_has_to_be_given():
    config = on_gpus().get_optimal_config("8B", "24GB")
    assert "num_gpus" not in config
    assert config.assumptions["processes"] == "any number: none was given, and no GPU is visible here"
    assert config["plugin"] == manager.get_optimal_config("8B", "24GB", 2)["plugin"]
    with pytest.raises(ValueError, match=r"no GPU is visible .* The driver is gone\..*cpu_dry_run"):
        on_gpus(notes=("The driver is gone.",)).get_optimal_config("8B")


# ---- Taken by enable_multi_gpu ----


def test_there_is_a_template_for_each_usual_case():
    assert list(manager.templates()) == TEMPLATES
    assert [template["num_gpus"] for template in manager.templates().values()] == [1, 2, 4, 8, 2]
    assert "dtype=torch.float16" in manager.templates()["two_t4_fp16"].assumptions["precision"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_enable_multi_gpu_takes_a_template(name, tmp_path, capsys):
    template = manager.templates()[name]
    assert manager.validate(template) == []
    if template["num_gpus"] > 1:  # no launcher started this process, which is found after every check of the options
        with pytest.raises(SystemExit) as caught:
            enable_multi_gpu(**template)
        assert caught.value.code == 2
        assert f"num_gpus={template['num_gpus']} needs {template['num_gpus']} processes" in capsys.readouterr().err
    here = {**template, "num_gpus": 1}
    with enable_multi_gpu(**here):
        active = accelerate_unsloth.get_active_config()
        assert {name: active[name] for name in here} == here
    path = tmp_path / "template.yaml"
    manager.save(template, path)
    assert manager.load(path) == template


# ---- Problems ----


def test_every_problem_is_listed_with_its_fix():
    config = {"num_gpus": 0, "batch_size": 3, "enable_gradient_checkpointing": "yes", "rate": 1, "plugin": 4}
    assert manager.validate(config) == [
        "'batch_size' is not an option of enable_multi_gpu(). Did you mean batch_size_per_gpu?",
        "'rate' is not an option of enable_multi_gpu(). Leave it out; known are num_gpus, batch_size_per_gpu, ddp_backend, "
        "enable_memory_optimization, enable_gradient_checkpointing, find_unused_parameters, plugin.",
        "num_gpus=0 is not a whole number of at least 1. Give one, or leave it out.",
        "enable_gradient_checkpointing='yes' is unknown; use True, False or None.",
        "plugin=4 is a int; pass an accelerate_unsloth.UnslothPlugin.",
    ]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"enable_gradient_checkpointing": False, "plugin": UnslothPlugin(gradient_checkpointing="unsloth")},
            "enable_gradient_checkpointing=False contradicts",
        ),
        (
            {"plugin": UnslothPlugin(micro_batch="fixed", micro_batch_tokens=9)},
            "micro_batch_tokens=9 has no effect with micro_batch='fixed'",
        ),
        ({}, None),
        ({"enable_gradient_checkpointing": True, "plugin": UnslothPlugin(gradient_checkpointing="unsloth")}, None),
        ({"enable_gradient_checkpointing": False, "plugin": UnslothPlugin()}, None),
        ({"plugin": UnslothPlugin(micro_batch_tokens=9)}, None),
    ],
)
def test_options_that_have_no_effect_beside_others_are_found(config, problem):
    found = manager.validate(config)
    assert len(found) == (problem is not None)
    assert all(said.startswith(problem) for said in found)


def test_a_plugin_that_was_changed_after_it_was_made_is_checked_again():
    plugin = UnslothPlugin()
    plugin.micro_batch, plugin.on_nonfinite = "automatic", "stopp"
    micro_batch, on_nonfinite = manager.validate({"plugin": plugin})
    assert "micro_batch='automatic' is not known; choose one of auto, fixed" in micro_batch
    assert "on_nonfinite='stopp' is not known" in on_nonfinite


def test_a_wrong_environment_variable_is_said_once(monkeypatch):
    plugin = UnslothPlugin()
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MONITORS", "1")
    (found,) = manager.validate({"plugin": plugin})
    assert "Did you mean ACCELERATE_UNSLOTH_MONITOR?" in found


# ---- Files ----


def test_a_saved_configuration_means_the_same_under_another_environment(tmp_path, monkeypatch):
    config = {"num_gpus": 4, "plugin": UnslothPlugin(on_nonfinite="skip", watchdog_timeout_s=None)}
    manager.save(config, str(tmp_path / "own.yaml"))
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MONITOR", "0")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_WATCHDOG_TIMEOUT_S", "9")
    loaded = manager.load(tmp_path / "own.yaml")
    assert loaded == config
    assert asdict(loaded["plugin"])["monitor"] is True


def test_a_saved_file_explains_itself_and_is_plain_yaml(tmp_path):
    config = manager.get_optimal_config("8B", "24GB", 2)
    manager.save(config, tmp_path / "c.yaml")
    text = (tmp_path / "c.yaml").read_text()
    assert "# model: 8B, with the dims of Llama-3.1-8B\n" in text
    assert yaml.safe_load(text)["plugin"]["micro_batch_tokens"] == config["plugin"].micro_batch_tokens


def test_a_file_of_a_person_may_hold_a_few_options(tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size_per_gpu: 2\nplugin:\n  on_oversized: skip\n")
    loaded = manager.load(tmp_path / "c.yaml")
    assert loaded == {"batch_size_per_gpu": 2, "plugin": UnslothPlugin(on_oversized="skip")}


def test_unknown_names_and_values_in_a_file_are_all_rejected_with_a_message(tmp_path):
    (tmp_path / "c.yaml").write_text("num_gpu: 2\nplugin:\n  enigne: auto\n  monitor: perhaps\n3: x\n")
    with pytest.raises(ValueError, match=r"c\.yaml cannot be used") as caught:
        manager.load(tmp_path / "c.yaml")
    for said in (
        "'num_gpu' is not an option of enable_multi_gpu(). Did you mean num_gpus?",
        "'enigne' is not an option of UnslothPlugin. Did you mean engine?",
        "monitor='perhaps' is neither true nor false",
        "3 is not an option of enable_multi_gpu()",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plugin: !!python/object:accelerate_unsloth.UnslothPlugin {}", "is not plain YAML"),
        ("num_gpus: [1", "is not plain YAML"),
        ("- num_gpus", "The options are a list"),
        ("", "The options are a NoneType"),
        ("plugin: auto", "plugin='auto' is a str"),
    ],
)
def test_what_is_no_plain_mapping_is_rejected(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        manager.load(tmp_path / "c.yaml")


def test_a_wrong_configuration_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="cannot be saved") as caught:
        manager.save({"num_gpus": 0, "num_gpu": 1}, tmp_path / "c.yaml")
    assert "num_gpus=0" in str(caught.value) and "'num_gpu' is not" in str(caught.value)
    assert not (tmp_path / "c.yaml").exists()


# ---- The example ----


@pytest.mark.slow
def test_the_advanced_example_trains(tiny_model, tmp_path):
    finished = launch(ROOT / "examples" / "advanced_config.py", [tiny_model, tmp_path / "out"], real_launcher=True)
    assert finished.status == 0, finished.output[-4000:]
    assert finished.output.count("processes: 2 on the CPU") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert manager.load(tmp_path / "out" / "multi_gpu.yaml")["num_gpus"] == 2
