"""The installation check: its comparisons on plain numbers, and the command itself, once where it works and once not."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accelerate_unsloth.commands import app
from accelerate_unsloth.commands.test import run as check
from accelerate_unsloth.commands.test.run import FAILED, OK, SKIPPED, Check, passed, run
from accelerate_unsloth.testing import launching

from ..launching import ROOT, clean_environment, finish, start_script


@pytest.mark.parametrize(
    ("losses", "status"),
    [([3.0, 2.0], OK), ([2.0, 3.0], FAILED), ([3.0, math.nan, 2.0], FAILED), ([3.0], FAILED), ([], FAILED)],
)
def test_a_loss_has_to_fall(losses, status):
    assert check.learns(2, losses).status == status


@pytest.mark.parametrize(
    ("several", "status"),
    [
        ([3.0, 2.0], OK),
        ([3.00001, 2.0], OK),
        ([3.0, 2.0001], FAILED),
        ([3.0, math.nan], FAILED),
        ([3.0], FAILED),
    ],
)
def test_losses_are_compared_step_by_step(several, status):
    assert check.same_losses([3.0, 2.0], several, tolerance=1e-5).status == status


def test_ranks_with_other_weights_are_named():
    assert check.same_weights(["a", "a"]).status == OK
    different = check.same_weights(["a", "a", "b"])
    assert (different.status, different.detail) == (FAILED, "rank(s) 2 differ from rank 0")


@pytest.mark.parametrize(
    ("devices", "on_gpu", "status"),
    [
        ([["cpu"], ["cpu"]], False, OK),
        ([["cuda:0"], ["cuda:1"]], True, OK),
        ([["cuda:0"], ["cuda:0"]], True, FAILED),
        ([["cuda:0"], ["cuda:0", "cuda:1"]], True, FAILED),
        ([["cpu"]], True, FAILED),
    ],
)
def test_each_rank_is_on_its_own_device(devices, on_gpu, status):
    assert check.right_devices(devices, on_gpu).status == status


@pytest.mark.parametrize(
    ("trained", "reloaded", "status"),
    [([1.0, 5.0], [1.0, 5.0], OK), ([1.0, 5.0], [1.0, 4.0], FAILED), ([1.0, 1.0], [1.0, 1.0], FAILED)],
    ids=["the same", "another", "never trained"],
)
def test_a_reloaded_adapter_computes_what_was_trained(trained, reloaded, status):
    outputs = {"base": [1.0, 1.0], "trained": trained, "reloaded": reloaded}
    assert check.reloads(outputs, tolerance=1e-3).status == status


def test_a_skipped_check_does_not_fail():
    assert passed([Check("a", OK, ""), Check("b", SKIPPED, "")])
    assert not passed([Check("a", OK, ""), Check("b", FAILED, "")])


def test_fewer_processes_than_one_are_refused():
    with pytest.raises(ValueError, match="num_processes=0"):
        run(num_processes=0)


def test_the_environment_of_a_launch_is_its_own():
    given = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "relative", "HOME": "/home/me"}
    cleaned = launching.clean_environment(given, HF_HOME="/here")
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & set(cleaned)
    assert (cleaned["HOME"], cleaned["HF_HOME"]) == ("/home/me", "/here")
    assert cleaned["PYTHONPATH"].endswith(str(Path("relative").absolute()))


def test_what_does_not_end_is_ended_with_all_it_started(tmp_path):
    child = "import time; time.sleep(15); print('survived')"
    (tmp_path / "endless.py").write_text(
        f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", "{child}"], start_new_session=True)\n'
    )
    # It waits for whoever still holds the output, so that a survivor would be heard.
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        launching.run_python(["-m", "endless"], clean_environment(), tmp_path, timeout_s=2)
    assert "survived" not in expired.value.output


def command(words, folder, variables=None):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder, env=clean_environment(variables),
        timeout=240,
    )  # fmt: skip


CLI = ["-c", "from accelerate_unsloth.commands import app; app()", "test"]


def run_forked(words, environment, folder, timeout_s):
    """As `run_python`, but forked from a process that has imported what is heavy."""
    (module,) = (number for number, word in enumerate(words) if word.startswith("accelerate_unsloth."))
    launcher, script = words[: module - 1], words[module - 1 :]
    processes = int(launcher[launcher.index("--num_processes") + 1]) if launcher else 1
    return finish(start_script(script, launcher, processes, {"HF_HOME": environment["HF_HOME"]}, folder), timeout_s)


STATEMENTS = ("those of one process", "the same weights", "its own device", "plain PEFT")


@pytest.mark.launch
def test_the_command_passes_here(monkeypatch):
    monkeypatch.setattr(launching, "run_python", run_forked)
    done = CliRunner().invoke(app, ["test"])
    assert done.exit_code == 0, done.output
    for statement in STATEMENTS:
        assert any(line.startswith("[ok]") and statement in line for line in done.output.splitlines()), done.output


@pytest.mark.slow
@pytest.mark.launch
def test_the_command_passes_here_and_leaves_nothing_behind(tmp_path):
    done = command(CLI, tmp_path, {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    for statement in STATEMENTS:
        assert any(line.startswith("[ok]") and statement in line for line in done.stdout.splitlines()), done.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("accelerate_unsloth", "unsloth"))]


@pytest.mark.slow
@pytest.mark.launch
def test_the_example_fails_with_status_1_and_the_reason(tmp_path):
    example = [str(ROOT / "examples" / "verify_installation.py")]
    done = command(example, tmp_path, {"ACCELERATE_UNSLOTH_ENGINE": "unsloth"})
    assert done.returncode == 1
    assert "[failed] every process ends in order: ended with status 1" in done.stdout
    assert "engine='unsloth' was requested, but" in done.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_the_command_notices_ranks_that_do_not_meet(tmp_path):
    """An installation whose all-reduce does nothing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    from types import SimpleNamespace\n"
        "    from accelerate_unsloth import reduction\n"
        "    sent = SimpleNamespace(wait=lambda: None)\n"
        "    all_reduce = lambda *args, **options: sent\n"
        "    reduction.dist = SimpleNamespace(**vars(reduction.dist) | {'all_reduce': all_reduce})\n"
    )
    done = command(CLI, tmp_path, {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "[failed] the losses are those of one process" in done.stdout
