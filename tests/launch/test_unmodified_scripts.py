"""Unsloth's scripts with one line in front of them: the training that the explicit imports give."""

import json

import pytest

from ..launching import ROOT, WORKERS, launch

pytestmark = pytest.mark.launch

ENABLE = "import accelerate_unsloth\n\naccelerate_unsloth.enable_multi_gpu()"
# The recent script as the explicit imports want it; bf16 on a CPU has to be said there.
EXPLICIT = {
    "from unsloth import FastLanguageModel": "from accelerate_unsloth import FastLanguageModel",
    "from trl import SFTTrainer, SFTConfig": "from accelerate_unsloth import SFTTrainer, SFTConfig",
    "        max_length=128,\n": "        max_length=128,\n        use_cpu=True,\n",
}
UNTOUCHED = "# nothing of accelerate_unsloth"


def rewritten(name, beginning, replacements, folder):
    """A copy of a worker that does not begin with `ENABLE`."""
    text = (WORKERS / name).read_text()
    for old, new in {ENABLE: beginning, **replacements}.items():
        assert old in text
        text = text.replace(old, new)
    script = folder / name
    script.write_text(text)
    return script


def losses(folder):
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def train(tiny_model, uneven_data, tmp_path_factory):
    """Train with a script, once, in two processes: its losses and what it printed."""
    done = {}

    def start(name, script, launcher=(), arguments=(), real_launcher=False):
        if name not in done:
            folder = tmp_path_factory.mktemp("scripts")
            finished = launch(
                script,
                [*arguments, tiny_model, uneven_data, folder / "out"],
                environment={"HF_HOME": str(folder / "cache")},
                launcher=launcher,
                real_launcher=real_launcher,
            )
            assert finished.status == 0, finished.output[-4000:]
            done[name] = losses(folder / "out"), finished.output, folder / "out"
        return done[name]

    return start


@pytest.fixture(scope="module")
def explicit(train, tmp_path_factory):
    script = rewritten("unsloth_recent.py", UNTOUCHED, EXPLICIT, tmp_path_factory.mktemp("explicit"))
    return train("explicit", script)[0]


@pytest.mark.parametrize(
    ("script", "real_launcher"),
    [
        ("unsloth_recent.py", False),
        ("unsloth_notebook.py", False),
        pytest.param("unsloth_recent.py", True, marks=pytest.mark.slow),
    ],
)
def test_a_script_with_one_line_in_front_gives_the_losses_of_the_explicit_imports(
    script, real_launcher, train, explicit
):
    assert len(explicit) == 6
    name = f"{script}, started afresh" if real_launcher else script
    found, output, out = train(name, WORKERS / script, real_launcher=real_launcher)
    assert found == explicit
    assert "per device 2 x accumulation 2 x processes 2" in output
    assert (out / "lora_model" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_script_that_cannot_be_edited_is_run_as_a_module_argument(train, explicit, tmp_path):
    script = rewritten("unsloth_notebook.py", UNTOUCHED, {}, tmp_path)
    found, output, _ = train("-m", "accelerate_unsloth", launcher=["-m"], arguments=[script])
    assert found == explicit
    assert "per device 2 x accumulation 2 x processes 2" in output


@pytest.mark.slow
def test_the_batch_size_of_the_call_wins_over_the_scripts(train, tmp_path):
    line = ENABLE.replace("()", "(batch_size_per_gpu=1, num_gpus=2)")
    script = rewritten("unsloth_recent.py", line, {}, tmp_path)
    assert "per device 1 x accumulation 2 x processes 2" in train("batch size", script)[1]


@pytest.mark.slow
def test_an_error_inside_the_context_is_printed_once(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import accelerate_unsloth\nwith accelerate_unsloth.enable_multi_gpu():\n    raise KeyError('lost')\n"
    )
    finished = launch(script)
    assert finished.status != 0
    own = finished.output.split("torch/distributed/elastic")[0]
    assert own.count("KeyError: 'lost'") == 1


@pytest.mark.slow
def test_a_launch_of_another_size_is_refused_once_with_both_numbers(tmp_path):
    script = tmp_path / "three.py"
    script.write_text("import accelerate_unsloth\naccelerate_unsloth.enable_multi_gpu(num_gpus=3)\n")
    finished = launch(script)
    assert finished.status != 0
    assert finished.output.count("num_gpus=3 was asked for, but this launch has 2 process(es)") == 1


@pytest.mark.slow
def test_the_process_group_is_gloo_on_a_cpu_whatever_is_said(tmp_path):
    script = tmp_path / "backend.py"
    script.write_text(
        "import sys, accelerate_unsloth\n"
        "accelerate_unsloth.enable_multi_gpu(ddp_backend='nccl')\n"
        "from transformers import TrainingArguments\n"
        "import torch.distributed as dist\n"
        "TrainingArguments(sys.argv[1], ddp_backend='nccl')\n"
        "status = accelerate_unsloth.get_multi_gpu_status()\n"
        "print(f\"said {dist.get_backend()} {status['rank']} {status['device']}\\n\", end='')\n"
    )
    finished = launch(script, [tmp_path])
    assert finished.status == 0, finished.output[-3000:]
    for rank in (0, 1):
        assert f"said gloo {rank} cpu" in finished.output


@pytest.mark.slow
def test_the_quick_start_trains(tiny_model, tmp_path):
    finished = launch(ROOT / "examples" / "quick_start.py", [tiny_model, tmp_path / "out"], real_launcher=True)
    assert finished.status == 0, finished.output[-4000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
