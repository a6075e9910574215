"""What a user gets for a mistake: one message, and the end of all processes, soon and with a non-zero status."""

import pytest

from ..launching import WORKERS, launch

pytestmark = pytest.mark.launch

MESSAGES = {
    "empty dataset": "The training dataset is empty",
    "missing column": "has the columns 'question', 'answer', and none of the forms that SFT reads",
    "all labels masked": "No sample of the training dataset has a token to learn from",
    "only first tokens": "or are first tokens",
    "broken sample": "content",
    "missing text": "2 of 8 samples have no 'completion' (None), the first at index 3",
    "rows of its own on each rank": "different datasets (train): 8 rows on rank 0 and 4 on rank 1",
    "order of its own on each rank": "different datasets (train): other rows on rank 1 than on rank 0, 8 on each",
    "plugin of another type": "plugin has to be an UnslothPlugin, such as UnslothPlugin(report=False), not {'report': False}",
    "wrong model path": "is a path that does not exist on this machine",
    "4-bit on a CPU": "load_in_4bit=True needs Unsloth on a GPU",
    "model over several devices": "device_map='auto' does not put the whole model on cpu",
    "wrong path on one rank": "is a path that does not exist on this machine",
    "other settings on one rank": "argument learning_rate: 0.0001 on rank 0; 0.0002 on rank 1",
    "a rank that leaves before": "Rank 1 ended, and rank 0 still waits for it in 'training'",
    "error in a step of one rank": "the third step of rank 1 failed",
    "folder not writable": "/proc/no",
}
# An error on one rank while it loads, and while it trains: also with the real launcher.
REAL = ("error in a step of one rank",)

SECRET = "hf_secretOfTheEnvironment"


def run(case, tiny_model, folder, environment=None, **how):
    environment = {"HF_HOME": str(folder / "cache"), "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET} | (environment or {})
    arguments = [case, tiny_model, folder / "out"]
    return launch(WORKERS / "bad_input.py", arguments, environment=environment, timeout_s=60, **how)


@pytest.mark.parametrize(
    ("case", "real_launcher"),
    [*((case, False) for case in MESSAGES), *(pytest.param(case, True, marks=pytest.mark.slow) for case in REAL)],
)
def test_a_mistake_gives_one_message_and_ends_all(case, real_launcher, tiny_model, tmp_path):
    finished = run(case, tiny_model, tmp_path, real_launcher=real_launcher)
    assert finished.status != 0
    assert MESSAGES[case] in finished.output
    assert SECRET not in finished.output
    own = finished.output.split("torch/distributed/elastic")[0]  # before the launcher's own report
    chained = own.count("direct cause of the following") + own.count("another exception occurred")
    assert own.count("Traceback (most recent call last)") == 1 + chained


@pytest.mark.parametrize(
    ("variable", "value", "message", "real_launcher"),
    [
        ("ACCELERATE_UNSLOTH_ENGINE", "unslot", "Did you mean 'unsloth'?", False),
        pytest.param("ACCELERATE_UNSLOTH_ENGINE", "unslot", "Did you mean 'unsloth'?", True, marks=pytest.mark.slow),
        ("ACCELERATE_UNSLOTH_ENGINE", "unsloth", "no GPU is visible", False),
        ("ACCELERATE_UNSLOTH_ATTENTIO", "auto", "Did you mean ACCELERATE_UNSLOTH_ATTENTION?", False),
    ],
)
def test_an_unknown_environment_value_is_refused_once(variable, value, message, real_launcher, tiny_model, tmp_path):
    finished = run("none", tiny_model, tmp_path, {variable: value}, real_launcher=real_launcher)
    assert finished.status != 0
    assert finished.output.count(message) == 1


def test_the_worker_is_right_without_a_mistake(tiny_model, tmp_path):
    assert run("none", tiny_model, tmp_path).status == 0
