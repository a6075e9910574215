"""`enable_multi_gpu` in one process: what it replaces and puts back, what it refuses, and what it says."""

import os
import subprocess
import sys

import pytest

import accelerate_unsloth
from accelerate_unsloth import UnslothPlugin
from accelerate_unsloth.launch.command import check_launch
from accelerate_unsloth.patches import PatchLog

from ..launching import ROOT, WORKERS, clean_environment, configs, launch


@pytest.fixture(autouse=True)
def disabled_afterwards():
    yield
    accelerate_unsloth.disable_multi_gpu()


def patched_things():
    """Identity of everything that may be replaced; `None` where nothing is."""
    import transformers
    import trl.trainer.sft_trainer

    from accelerate_unsloth.engines.select import FastLanguageModel
    from accelerate_unsloth.trainers.sft import SFTTrainer

    owners = (trl, trl.trainer, trl.trainer.sft_trainer)
    return [
        *(id(owner.SFTTrainer) for owner in owners),
        id(vars(SFTTrainer)["__init__"]),
        id(vars(transformers.TrainingArguments)["__post_init__"]),
        *(id(vars(FastLanguageModel)[name]) for name in ("from_pretrained", "get_peft_model")),
        id(sys.modules["unsloth"]) if "unsloth" in sys.modules else None,
        os.environ.get("ACCELERATE_UNSLOTH_LOG_ON_EACH_RANK"),
        id(sys.excepthook),
    ]


ALL_OPTIONS = {
    "num_gpus": 1,
    "batch_size_per_gpu": 3,
    "enable_gradient_checkpointing": True,
    "plugin": UnslothPlugin(memory_fraction=0.5),
}


def run(code, *arguments, environment=None):
    return subprocess.run(
        [sys.executable, *([code] if code == "-m" else ["-c", code]), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=clean_environment(environment),
        cwd=ROOT,
    )


# ---- In and out ----


def test_a_script_gets_the_classes_of_the_explicit_imports():
    accelerate_unsloth.enable_multi_gpu()
    from trl import SFTTrainer
    from trl.trainer import SFTTrainer as second
    from trl.trainer.sft_trainer import SFTTrainer as third
    from unsloth import FastLanguageModel, FastModel

    assert SFTTrainer is second is third is accelerate_unsloth.SFTTrainer
    assert FastLanguageModel is accelerate_unsloth.FastLanguageModel
    assert FastModel is accelerate_unsloth.FastModel


def test_disabling_restores_every_attribute():
    before = patched_things()
    accelerate_unsloth.enable_multi_gpu(**ALL_OPTIONS)
    during = patched_things()
    assert [one is other or one == other for one, other in zip(before, during, strict=True)] == [False] * 9 + [True]
    accelerate_unsloth.disable_multi_gpu()
    assert patched_things() == before
    assert not accelerate_unsloth.is_multi_gpu_enabled()


def test_the_context_restores_after_an_error():
    before = patched_things()
    with pytest.raises(KeyError, match="lost"), accelerate_unsloth.enable_multi_gpu(**ALL_OPTIONS):
        assert accelerate_unsloth.is_multi_gpu_enabled()
        raise KeyError("lost")
    assert patched_things() == before
    assert accelerate_unsloth.get_active_config() is None


def test_an_inner_context_leaves_the_outer_one_in_force():
    with accelerate_unsloth.enable_multi_gpu():
        with accelerate_unsloth.enable_multi_gpu():
            pass
        assert accelerate_unsloth.is_multi_gpu_enabled()
    assert not accelerate_unsloth.is_multi_gpu_enabled()


def test_a_failure_while_enabling_leaves_nothing_behind(monkeypatch):
    before = patched_things()
    import trl

    monkeypatch.setattr(sys.modules["__main__"], "Trainer", trl.SFTTrainer, raising=False)
    with pytest.raises(RuntimeError, match=r"the script has already imported trl.SFTTrainer as 'Trainer'"):
        accelerate_unsloth.enable_multi_gpu(**ALL_OPTIONS)
    assert patched_things() == before
    assert not accelerate_unsloth.is_multi_gpu_enabled()


def test_the_same_call_again_does_nothing_and_another_is_refused():
    accelerate_unsloth.enable_multi_gpu(batch_size_per_gpu=2)
    during = patched_things()
    accelerate_unsloth.enable_multi_gpu(batch_size_per_gpu=2)
    assert patched_things() == during
    with pytest.raises(RuntimeError, match="asks for batch_size_per_gpu=4 instead of 2"):
        accelerate_unsloth.enable_multi_gpu(batch_size_per_gpu=4)
    assert accelerate_unsloth.get_active_config()["batch_size_per_gpu"] == 2


# ---- What it says ----


def test_the_status_names_each_patch_and_its_original():
    accelerate_unsloth.enable_multi_gpu()
    status = accelerate_unsloth.get_multi_gpu_status()
    patches = {patch["patched"]: patch for patch in status["patches"]}
    assert patches["trl.SFTTrainer"]["original"] == "trl.trainer.sft_trainer.SFTTrainer"
    assert patches["trl.SFTTrainer"]["now"] == "accelerate_unsloth.trainers.sft.SFTTrainer"
    assert patches["sys.modules.unsloth"]["original"] == "absent"
    assert patches["sys.modules.unsloth"]["now"].startswith("unsloth, a stand-in made in ")
    assert status["enabled"] is True
    assert status["engine"]["name"] == "reference"
    assert (status["world_size"], status["rank"], status["device"]) == (1, 0, "cpu")


def test_the_active_configuration_can_be_passed_again():
    accelerate_unsloth.enable_multi_gpu(**ALL_OPTIONS)
    config = accelerate_unsloth.get_active_config()
    assert config == ALL_OPTIONS
    accelerate_unsloth.disable_multi_gpu()
    accelerate_unsloth.enable_multi_gpu(**config)
    assert accelerate_unsloth.get_multi_gpu_status()["plugin"]["memory_fraction"] == 0.5


def test_the_status_before_enabling():
    assert accelerate_unsloth.get_multi_gpu_status()["enabled"] is False


# ---- What the options do ----


@pytest.mark.parametrize(("wanted", "script", "found"), [(False, "unsloth", False), (True, False, True)])
def test_checkpointing_of_the_call_wins_over_the_scripts(wanted, script, found, tiny_model, uneven_data, tmp_path):
    accelerate_unsloth.enable_multi_gpu(
        enable_gradient_checkpointing=wanted, batch_size_per_gpu=3, plugin=UnslothPlugin(memory_fraction=0.5)
    )
    import datasets
    from transformers import TrainingArguments
    from trl import SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model), max_seq_length=32)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=script)
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=not wanted, report_to="none", seed=11)
    rows = datasets.Dataset.from_json(str(uneven_data), cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, args=arguments, train_dataset=rows, max_seq_length=16)
    assert trainer.args.gradient_checkpointing is found
    assert trainer.args.per_device_train_batch_size == 3
    assert trainer.args.max_length == 16
    assert trainer.args.seed == 11
    assert trainer.args.output_dir == str(tmp_path)
    assert trainer.plugin.memory_fraction == 0.5
    assert max(len(ids) for ids in trainer.train_dataset["input_ids"]) == 16


def test_a_keyword_that_no_trl_knew_is_refused_as_trl_does(tiny_model, uneven_data, tmp_path):
    accelerate_unsloth.enable_multi_gpu()
    import datasets
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model))
    rows = datasets.Dataset.from_json(str(uneven_data), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_sequence_length'"):
        SFTTrainer(model, SFTConfig(str(tmp_path)), train_dataset=rows, tokenizer=tokenizer, max_sequence_length=16)


def test_names_that_the_replacement_of_unsloth_lacks_raise_an_error():
    accelerate_unsloth.enable_multi_gpu()
    for name in ("FastVisionModel", "chat_templates"):
        with pytest.raises(ImportError, match=r"This process uses the reference engine .* has only FastLanguageModel"):
            exec(f"from unsloth import {name}")
    with pytest.raises(ImportError, match="run on a machine with a GPU"):
        from unsloth.chat_templates import get_chat_template  # noqa: F401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 0}, "num_gpus=0 is not a whole number of at least 1"),
        ({"batch_size_per_gpu": "4"}, "batch_size_per_gpu='4' is not a whole number"),
        ({"enable_gradient_checkpointing": "unsloth"}, "use True, False or None"),
        ({"plugin": {"memory_fraction": 0.5}}, "is a dict; pass an accelerate_unsloth.UnslothPlugin"),
    ],
)
def test_an_unknown_value_is_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        accelerate_unsloth.enable_multi_gpu(**options)


def test_options_without_effect_are_accepted_with_one_warning():
    options = {"ddp_backend": "gloo", "enable_memory_optimization": False, "find_unused_parameters": True}
    with pytest.warns(UserWarning, match="ddp_backend='gloo', enable_memory_optimization=False, find_un") as caught:
        accelerate_unsloth.enable_multi_gpu(**options)
        accelerate_unsloth.enable_multi_gpu(**options)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_contradiction_between_the_call_and_the_plugin_is_rejected():
    plugin = UnslothPlugin(gradient_checkpointing="none")
    with pytest.raises(ValueError, match="contradicts the plugin's gradient_checkpointing='none'"):
        accelerate_unsloth.enable_multi_gpu(enable_gradient_checkpointing=True, plugin=plugin)


def test_a_mapping_entry_can_be_undone_alone():
    patch_log, mapping = PatchLog(), {"kept": 1}
    first, _ = patch_log.patch(mapping, "new", 2), patch_log.patch(mapping, "kept", 3)
    patch_log.undo([first])
    assert mapping == {"kept": 3}
    patch_log.undo()
    assert mapping == {"kept": 1}


# ---- Started without a launcher ----


@pytest.mark.parametrize(
    ("num_gpus", "world_size", "launched", "visible", "goes_on"),
    [
        (None, 1, False, 8, True),
        (4, 4, True, 4, True),
        (4, 4, True, 0, True),
        (1, 1, False, 0, True),
        (4, 1, False, 8, False),
        (4, 1, False, 0, False),
    ],
)
def test_which_launch_is_served(num_gpus, world_size, launched, visible, goes_on):
    assert check_launch(num_gpus, world_size, launched, visible) is goes_on


@pytest.mark.parametrize(
    ("world_size", "launched", "visible", "message"),
    [
        (2, True, 8, "num_gpus=4 was asked for, but this launch has 2 process"),
        (1, True, 8, "num_gpus=4 was asked for, but this launch has 1 process"),
        (1, False, 2, r"num_gpus=4 was asked for, but 2 GPU\(s\) are visible"),
    ],
)
def test_both_numbers_are_said_where_they_differ(world_size, launched, visible, message):
    with pytest.raises(ValueError, match=message):
        check_launch(4, world_size, launched, visible)


def test_without_a_launcher_the_script_ends_with_the_command_to_type(tmp_path):
    script = tmp_path / "my script.py"
    script.write_text("import accelerate_unsloth\naccelerate_unsloth.enable_multi_gpu(num_gpus=4)\nprint('went on')\n")
    command = [sys.executable, str(script), "--name", "two words"]
    finished = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=ROOT)
    file = configs.path("unsloth_ddp_cpu")
    expected = f"accelerate launch --num_processes 4 --config_file {file} '{script}' --name 'two words'\n"
    assert finished.returncode == 2
    assert finished.stderr.endswith(expected)
    assert finished.stderr.count("accelerate_unsloth: num_gpus=4 needs 4 processes") == 1
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


# ---- python -m accelerate_unsloth ----


@pytest.mark.launch
def test_the_module_runs_a_script_as_python_would(tmp_path):
    (tmp_path / "neighbour.py").write_text("found = True\n")
    (tmp_path / "script.py").write_text(
        "import sys, neighbour, accelerate_unsloth\n"
        "print(__name__, sys.argv[1:], sys.argv[0] == __file__, sys.path[0], accelerate_unsloth.is_multi_gpu_enabled())\n"
        "raise SystemExit(5)\n"
    )
    finished = launch("-m", ["accelerate_unsloth", tmp_path / "script.py", "--a", "b c"], processes=1)
    assert finished.status == 5, finished.output
    assert finished.output.splitlines()[-1] == f"__main__ ['--a', 'b c'] True {tmp_path.resolve()} True"


@pytest.mark.launch
def test_the_variable_turns_the_module_off(tmp_path):
    (tmp_path / "script.py").write_text("import accelerate_unsloth as a; print(a.is_multi_gpu_enabled())\n")
    for value, enabled in (("0", "False"), ("1", "True")):
        variable = {"ACCELERATE_UNSLOTH_ENABLE": value}
        finished = launch("-m", ["accelerate_unsloth", tmp_path / "script.py"], 1, variable)
        assert finished.output.splitlines()[-1] == enabled, finished.output
    finished = launch("-m", ["accelerate_unsloth", tmp_path / "script.py"], 1, {"ACCELERATE_UNSLOTH_ENABLE": "2"})
    assert "ACCELERATE_UNSLOTH_ENABLE='2' is neither true nor false" in finished.output


def test_a_missing_script_is_named():
    finished = run("-m", "accelerate_unsloth", "nowhere.py")
    assert finished.returncode == 2
    assert "'nowhere.py' is not a file here" in finished.stderr


def test_the_command_of_a_module_names_the_module(tmp_path):
    module = tmp_path / "job.py"
    module.write_text("from accelerate_unsloth.launch import command; print(command.command(2))\n")
    finished = run("-m", "job", "--x", environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert finished.stdout.endswith(" -m job --x\n"), finished.stderr


@pytest.mark.launch
def test_the_command_of_a_script_that_the_module_runs_names_both(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("from accelerate_unsloth.launch import command; print(command.command(2))\n")
    finished = launch("-m", ["accelerate_unsloth", script, "--x"], processes=1)
    assert finished.output.endswith(f" -m accelerate_unsloth {script} --x\n"), finished.output


def test_the_command_of_a_script_that_another_module_runs_names_the_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("from accelerate_unsloth.launch import command; print(command.command(2))\n")
    finished = run("-m", "cProfile", "-o", tmp_path / "profile", script, "--x")
    assert f" {script} --x\n" in finished.stdout, finished.stderr
    assert "-m" not in finished.stdout
    (tmp_path / "folder").mkdir()
    script.rename(tmp_path / "folder" / "__main__.py")
    finished = subprocess.run(
        [sys.executable, str(tmp_path / "folder"), "--y"], capture_output=True, text=True, env=clean_environment()
    )
    assert finished.stdout.endswith(f"{tmp_path / 'folder'} --y\n"), finished.stderr


def test_code_without_a_file_is_told_to_get_one():
    finished = run("import accelerate_unsloth as a; a.enable_multi_gpu(num_gpus=2)")
    assert finished.returncode == 2
    assert "Save it as train.py" in finished.stderr
    assert finished.stderr.rstrip().endswith("unsloth_ddp_cpu.yaml train.py")


def test_trainers_that_stay_trls_own_are_named_once(capsys, tmp_path):
    from trl import DPOConfig, RLOOConfig, SFTConfig

    with accelerate_unsloth.enable_multi_gpu():
        for kind in (SFTConfig, DPOConfig, RLOOConfig, RLOOConfig):
            kind(str(tmp_path))
    said = capsys.readouterr().out
    assert said.count("RLOOTrainer is TRL's own") == said.count("TRL's own") == 1
    RLOOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert "TRL's own" not in capsys.readouterr().out


def test_preference_trainers_are_ours_wherever_a_script_takes_them_from():
    import trl
    from trl.experimental import cpo, orpo

    taken = ("DPOTrainer", "RewardTrainer", "KTOTrainer")
    with accelerate_unsloth.enable_multi_gpu():
        assert all(getattr(trl, name) is getattr(accelerate_unsloth, name) for name in taken)
        assert (orpo.ORPOTrainer, cpo.CPOTrainer) == (accelerate_unsloth.ORPOTrainer, accelerate_unsloth.CPOTrainer)
    assert not any(getattr(trl, name) is getattr(accelerate_unsloth, name) for name in taken)


def test_a_script_is_not_warned_of_trainers_that_it_does_not_use():
    finished = run("import accelerate_unsloth as a; a.enable_multi_gpu(); print('done')")
    assert finished.stdout.endswith("done\n"), finished.stderr
    assert "Experimental" not in finished.stderr


def test_the_call_costs_nothing_before_it_is_made():
    finished = run("import sys, accelerate_unsloth as a; a.enable_multi_gpu; print('torch' in sys.modules)")
    assert finished.stdout.strip() == "False", finished.stderr


def test_the_scripts_of_the_proof_are_unmodified():
    for name in ("unsloth_notebook.py", "unsloth_recent.py"):
        beginning, *rest = (WORKERS / name).read_text().split("from unsloth import FastLanguageModel\n")
        assert beginning == "import accelerate_unsloth\n\naccelerate_unsloth.enable_multi_gpu()\n"
        assert "accelerate" not in "".join(rest)


def test_old_spellings_beside_plain_training_arguments_are_kept_as_unsloths_config_names_them(monkeypatch):
    """Unsloth's SFTConfig has `max_seq_length`; TRL would drop a text field that is only set on TrainingArguments."""
    from dataclasses import dataclass

    from transformers import TrainingArguments
    from trl import SFTConfig

    from accelerate_unsloth.patch import points

    @dataclass
    class ConfigOfUnsloth(SFTConfig):
        max_seq_length: int | None = None

    monkeypatch.setattr(points, "SFTConfig", ConfigOfUnsloth)
    keywords = {"max_seq_length": 64, "dataset_text_field": "summary", "tokenizer": "any"}
    args, left = points.to_installed_trl(TrainingArguments("out", use_cpu=True, learning_rate=0.5), keywords)
    assert (args.max_seq_length, args.dataset_text_field, args.learning_rate) == (64, "summary", 0.5)
    assert left == {"tokenizer": "any"}
