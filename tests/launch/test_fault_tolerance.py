"""Failures of a long run, provoked for real: killed processes, a full disk. See docs/fault_tolerance.md."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from accelerate_unsloth.reliability import checkpoints, stop_signals

from ..launching import WORKERS, finish, launch, result
from ..launching import start as spawn

pytestmark = pytest.mark.launch

# (kills, how many of them at least leave a checkpoint half written)
KILLS = [(6, 1), pytest.param(20, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kills", "half_written"), KILLS)
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(
    kills, half_written, tiny_model, uneven_data, tmp_path
):
    arguments = [tiny_model, uneven_data, tmp_path, kills, 1]
    environment = {"HF_HOME": str(tmp_path / "cache")}
    finished = launch(WORKERS / "crash_loop.py", arguments, processes=1, environment=environment, timeout_s=600)
    assert finished.status == 0, finished.output[-3000:]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["ended"], (tmp_path / "killed" / "log.txt").read_text()[-3000:]
    assert outcome["killed"] == kills
    assert any(outcome["steps_seen"])  # some of them after a checkpoint
    assert outcome["half_written"] >= half_written
    assert outcome["in_evaluation"] == kills // 4
    assert result(tmp_path / "killed")["losses"] == result(tmp_path / "whole")["losses"]
    one, other = (load_file(tmp_path / name / "weights0.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def start(folder, tiny_model, uneven_data, processes=2, launcher=(), inside=(), real_launcher=False, **options):
    options["args"] = {"gradient_accumulation_steps": 2, "num_train_epochs": 2} | options.get("args", {})
    return launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, folder, json.dumps(options)],
        processes,
        environment={"HF_HOME": str(folder / "cache")},
        launcher=launcher,
        inside=inside,
        real_launcher=real_launcher,
    )


# Forked ranks under the launcher's own code, and all of it started afresh.
REAL_LAUNCHER = pytest.mark.parametrize(
    "real_launcher", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "real launcher"]
)
SAVING = {"save_strategy": "steps", "save_steps": 2}


@REAL_LAUNCHER
def test_the_launchers_own_restart_goes_on_from_the_last_checkpoint(real_launcher, tiny_model, uneven_data, tmp_path):
    arguments = SAVING | {"save_total_limit": 1}
    options = {"args": arguments, "resume": "auto", "provoke": {"what": "kill", "step": 5}}
    finished = start(
        tmp_path, tiny_model, uneven_data, launcher=["--max_restarts", "1"], real_launcher=real_launcher, **options
    )
    assert finished.status == 0, finished.output[-3000:]
    assert len(result(tmp_path)["losses"]) == 12
    # Both attempts are one run to `save_total_limit`.
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-12"]
    assert checkpoints.damage(tmp_path / "run" / "checkpoint-12") is None


@REAL_LAUNCHER
def test_a_preempted_run_finishes_its_step_saves_and_goes_on_later(real_launcher, tiny_model, uneven_data, tmp_path):
    folder = tmp_path / "stopped"
    folder.mkdir()
    provoke = {"what": "terminate_launcher", "step": 3}
    finished = start(folder, tiny_model, uneven_data, real_launcher=real_launcher, provoke=provoke)
    assert finished.status != 0
    assert finished.output.count("Stopped by a signal after step") == 1
    newest, _ = checkpoints.newest_complete(folder / "run")
    assert newest is not None

    resumed = start(folder, tiny_model, uneven_data, resume="auto")
    assert resumed.status == 0, resumed.output[-3000:]
    whole = tmp_path / "whole"
    whole.mkdir()
    assert start(whole, tiny_model, uneven_data).status == 0
    assert result(folder)["losses"] == pytest.approx(result(whole)["losses"], rel=1e-6)


def test_a_forked_worker_dies_of_a_signal_and_does_not_stop_the_training():
    from accelerate_unsloth.reliability.stop_signals import StopRequest

    stop = StopRequest()
    with stop.listening():
        worker = multiprocessing.get_context("fork").Process(target=threading.Event().wait, args=(30,))
        worker.start()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM
        assert stop.signal is None


def test_the_best_model_is_the_same_on_all_ranks(tiny_model, uneven_data, tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3}
    finished = start(tmp_path, tiny_model, uneven_data, args=SAVING | evaluating, evaluate=True)
    assert finished.status == 0, finished.output[-3000:]
    one, other = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    best = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert (tmp_path / "run" / best.rsplit("/", 1)[1]).is_dir()
    assert ".incomplete" not in best


@REAL_LAUNCHER
def test_a_signal_to_one_rank_stops_all_at_the_same_step(real_launcher, tiny_model, uneven_data, tmp_path):
    provoke = {"what": "interrupt", "step": 3}
    plugin = {"report": True}
    finished = start(tmp_path, tiny_model, uneven_data, real_launcher=real_launcher, provoke=provoke, plugin=plugin)
    assert finished.status != 0
    assert "Stopped by a signal after step 4" in finished.output
    assert "Stopped by a signal at step 4 of 12" in (tmp_path / "run" / "training_report.html").read_text()
    assert re.search(rf"exitcode\s*: {128 + signal.SIGINT}\b", finished.output)  # what schedulers understand
    assert checkpoints.newest_complete(tmp_path / "run")[0].name == "checkpoint-4"


def test_a_signal_counts_from_the_next_line_on(monkeypatch):
    """The thread that reads signals may be scheduled steps later; ranks would then stop after another step."""
    monkeypatch.setattr(stop_signals.StopRequest, "_read_signals", lambda self, reader: None)
    stop = stop_signals.StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


ASKED_TWICE = """
import threading
from accelerate_unsloth.reliability import stop_signals
stop_signals._REPEAT_S = 0.0  # one Ctrl-C may come from the terminal and the launcher
stop = stop_signals.StopRequest()
with stop.listening():
    print("listening", flush=True)
    while stop.signal is None:
        threading.Event().wait(0.01)
    print("noted", flush=True)
    threading.Event().wait()
"""


def test_a_second_ctrl_c_ends_the_process_at_once():
    process = spawn([sys.executable, "-c", ASKED_TWICE])
    for line in ("listening", "noted"):
        assert process.stdout.readline().strip() == line
        process.send_signal(signal.SIGINT)
    assert finish(process, timeout_s=30).status == 128 + signal.SIGINT


@REAL_LAUNCHER
def test_a_rank_that_stands_still_is_reported_and_all_end(real_launcher, tiny_model, uneven_data, tmp_path):
    options = {"plugin": {"watchdog_timeout_s": 3}, "provoke": {"what": "hang", "step": 3}}
    finished = start(tmp_path, tiny_model, uneven_data, real_launcher=real_launcher, **options)
    assert finished.status != 0
    assert finished.output.count("No step has ended for 3 s") == 1
    assert "rank 1: step 3, hang (" in finished.output
    stacks = (tmp_path / "run" / "stuck-rank1.txt").read_text()
    assert "provoke.py" in stacks
    assert "distributed_c10d" in (tmp_path / "run" / "stuck-rank0.txt").read_text()


def test_a_bad_number_on_one_rank_stops_all_with_its_samples(tiny_model, uneven_data, tmp_path):
    options = {"provoke": {"what": "nan", "step": 2}}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status != 0
    assert finished.output.count("The loss or a gradient of step 3 is not finite on rank") == 1
    assert "(samples [" in finished.output


def test_a_step_with_a_bad_number_can_be_skipped_on_all(tiny_model, uneven_data, tmp_path):
    options = {"plugin": {"on_nonfinite": "skip"}, "provoke": {"what": "nan", "step": 2}}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status == 0, finished.output[-3000:]
    assert "The step is skipped on all ranks" in finished.output
    one, other = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.isfinite(weight).all() for weight in one.values())


LARGE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(tiny_model, uneven_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, tiny_model, uneven_data, args=LARGE).status == 0
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_micro_batch_that_does_not_fit_is_cut_with_the_same_result(
    processes, undisturbed, tiny_model, uneven_data, tmp_path
):
    options = {"args": dict(LARGE), "provoke": {"what": "out_of_memory", "step": 1, "rank": processes - 1}}
    options["args"]["gradient_accumulation_steps"] = 4 // processes
    finished = start(tmp_path, tiny_model, uneven_data, processes, **options)
    assert finished.status == 0, finished.output[-3000:]
    assert result(tmp_path)["losses"] == pytest.approx(result(undisturbed)["losses"], rel=1e-5)
    assert result(tmp_path, rank=processes - 1)["skipped_samples"] == []
    assert finished.output.count("did not fit the memory and is split in two") == 1


def test_the_probe_plans_smaller_micro_batches_until_they_fit(undisturbed, tiny_model, uneven_data, tmp_path):
    options = {"args": LARGE, "plugin": {"micro_batch_tokens": 2000}, "memory_tokens": 260}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status == 0, finished.output[-3000:]
    assert result(tmp_path)["micro_batch_tokens"] <= 260
    assert result(tmp_path)["micro_batch_tokens"] == result(tmp_path, rank=1)["micro_batch_tokens"]
    assert "split in two" not in finished.output
    assert result(tmp_path)["losses"] == pytest.approx(result(undisturbed)["losses"], rel=1e-5)


def test_a_longest_sample_that_cannot_fit_is_refused_before_training(tiny_model, uneven_data, tmp_path):
    options = {"args": LARGE, "plugin": {"micro_batch_tokens": 2000}, "memory_tokens": 60}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status != 0
    assert finished.output.count("does not fit the memory of rank 0, 1") == 1
    assert "'loss'" not in finished.output


def test_running_out_of_memory_lowers_the_budget_of_all_ranks(undisturbed, tiny_model, uneven_data, tmp_path):
    provoke = {"what": "out_of_memory", "step": 1}
    options = {"args": LARGE, "plugin": {"micro_batch_tokens": 2000}, "provoke": provoke}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status == 0, finished.output[-3000:]
    assert finished.output.count("micro-batches are planned smaller from here on") == 1
    budgets = {result(tmp_path, rank)["micro_batch_tokens"] for rank in (0, 1)}
    assert len(budgets) == 1
    assert budgets.pop() < 2000
    assert result(tmp_path)["losses"] == pytest.approx(result(undisturbed)["losses"], rel=1e-5)


@pytest.mark.parametrize("planned", [True, False])
def test_activations_are_recomputed_after_all_where_keeping_them_does_not_fit(
    planned, undisturbed, tiny_model, uneven_data, tmp_path
):
    """By the probe where micro-batches are planned, and in the step itself where they are not."""
    options = {"args": LARGE, "memory_tokens": 2000, "kept_tokens": 60}
    options["plugin"] = {"micro_batch_tokens": 2000} if planned else {}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status == 0, finished.output[-3000:]
    assert result(tmp_path)["losses"] == pytest.approx(result(undisturbed)["losses"], rel=1e-5)
    assert result(tmp_path)["skipped_samples"] == []
    if planned:  # all that memory is there again
        assert result(tmp_path)["micro_batch_tokens"] > 60
        assert "split in two" not in finished.output


def test_a_sample_that_does_not_fit_alone_ends_the_run_with_its_index(tiny_model, uneven_data, tmp_path):
    # The Trainer's own way would begin anew with smaller batches, on that rank alone.
    options = {"args": LARGE | {"auto_find_batch_size": True}}
    options["provoke"] = {"what": "out_of_memory", "step": 1, "always": True}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status != 0
    assert "On rank 1 sample" in finished.output
    assert "set on_oversized='skip'" in finished.output


def test_samples_that_do_not_fit_alone_can_be_left_out_on_record(undisturbed, tiny_model, uneven_data, tmp_path):
    provoke = {"what": "out_of_memory", "step": 1, "always": True}
    finished = start(tmp_path, tiny_model, uneven_data, args=LARGE, provoke=provoke, plugin={"on_oversized": "skip"})
    assert finished.status == 0, finished.output[-3000:]
    assert len(result(tmp_path, rank=1)["skipped_samples"]) == 3  # rank 1's share of the last, incomplete batch
    assert finished.output.count("does not fit the memory and is left out of step 2") == 3
    left_out, whole = result(tmp_path)["losses"], result(undisturbed)["losses"]
    assert left_out[0] == pytest.approx(whole[0], rel=1e-6)
    assert left_out[1] == pytest.approx(whole[1], rel=0.1)  # still a mean, over the samples that were left


def test_weights_that_drift_apart_are_noticed_before_they_are_saved(tiny_model, uneven_data, tmp_path):
    options = {"args": SAVING, "provoke": {"what": "drift", "step": 3}}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status != 0
    assert finished.output.count("The trainable weights of rank(s) 1 differ from rank 0's at step 4") == 1
    assert checkpoints.newest_complete(tmp_path / "run")[0].name == "checkpoint-2"


# A mount namespace of its own, in which a folder can be made read-only without touching this machine.
NAMESPACE = ("unshare", "--map-root-user", "--mount")


def namespaces_are_permitted() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("what", "inside", "reason"),
    [
        ("full_disk", (), "File too large"),
        pytest.param("read_only_disk", NAMESPACE, "Read-only file system", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_takes_no_more_leaves_earlier_checkpoints_and_says_so_once(
    what, inside, reason, tiny_model, uneven_data, tmp_path
):
    if inside and not namespaces_are_permitted():
        pytest.skip("no read-only mount: this user may not make mount namespaces here")
    options = {"args": SAVING, "provoke": {"what": what, "rank": 0, "step": 3}}
    finished = start(tmp_path, tiny_model, uneven_data, inside=inside, **options)
    assert finished.status != 0
    assert finished.output.count("checkpoint-4 could not be written to") == 1
    assert reason in finished.output
    newest, passed_over = checkpoints.newest_complete(tmp_path / "run")
    assert newest == tmp_path / "run" / "checkpoint-2"
    assert passed_over == []


@pytest.mark.parametrize(
    ("what", "rank", "error"),
    [
        ("type_error_in_a_checkpoint", 0, 'TypeError: can only concatenate str (not "int") to str'),
        ("type_error_on_save", 1, "TypeError: a callback of a user is wrong"),
    ],
)
def test_a_users_own_error_while_saving_stays_what_it_is_and_ends_all(
    what, rank, error, tiny_model, uneven_data, tmp_path
):
    options = {"args": SAVING, "provoke": {"what": what, "rank": rank, "step": 3}}
    finished = start(tmp_path, tiny_model, uneven_data, **options)
    assert finished.status != 0
    assert finished.output.count(error) == 1, finished.output[-3000:]
    assert "Free some space" not in finished.output


def test_a_signal_keeps_the_newest_checkpoint_beside_the_best_though_the_limit_is_one(
    tiny_model, uneven_data, tmp_path
):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    provoke = {"what": "interrupt", "rank": 0, "step": 3}
    finished = start(
        tmp_path, tiny_model, uneven_data, processes=1, args=SAVING | best, evaluate=True, provoke=provoke
    )
    step = int(re.search(r"Stopped by a signal after step (\d+)", finished.output)[1])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-2",
        f"checkpoint-{step}",
    ]
