"""The benchmark: which runs, which figures, and a small one for real."""

import json
import subprocess
import sys

import pytest
from typer import BadParameter
from typer.testing import CliRunner

from accelerate_unsloth.commands import app, bench
from accelerate_unsloth.commands.bench import make_data, show, work_of
from accelerate_unsloth.commands.bench.runs import Run, Workload, figures, last_error, measure, pinned, plan
from accelerate_unsloth.commands.bench.worker import tokens_of

from ..launching import ROOT, clean_environment


def test_plain_comes_at_each_batch_and_each_choice_of_ours_is_taken_back_once():
    runs = plan([1, 2], [4, 16], batch=16)
    assert [run.name for run in runs if run.how == "plain"] == [
        "1 x plain, batch 4",
        "1 x plain, batch 16",
        "2 x plain, batch 4",
        "2 x plain, batch 16",
    ]
    taken_back = [run.environment for run in runs if run.environment]
    assert len(taken_back) == 4
    assert all(len(variables) == 1 for variables in taken_back)
    assert [run.batch for run in runs if run.how == "trl"] == [4, 4]
    assert {run.processes for run in runs if run.environment} == {2}


def clocks(ends):
    phases = ("python", "imported", "loaded", "adapters", "trainer", "first step", "trained", "saved")
    at = {"launched": 100.0} | {phase: 101.0 + turn for turn, phase in enumerate(phases)}
    return {"phases": at, "ends": ends, "peak_gib": 3.0, "losses": [2.0], "decisions": {}, "attention": "xformers"}


def test_the_figures_are_those_of_the_clocks():
    # Steps end at 0, 1, 3 and 5 s; the first rank has collated 10 tokens more in each, the second 30.
    first = clocks([(0.0, 10), (1.0, 20), (3.0, 30), (5.0, 40)])
    second = clocks([(0.0, 30), (0.9, 60), (2.9, 90), (4.9, 120)])
    second["phases"]["saved"] += 1
    found = figures([first, second])
    assert found["tokens_per_second"] == pytest.approx(20.0)  # 40 tokens in each of the last two steps of 2 s
    assert found["step_s"] == pytest.approx(2.0)
    assert found["imbalance"] == pytest.approx(1.5)
    assert found["end_to_end_s"] == pytest.approx(9.0)  # when the last rank had saved
    assert found["attention"] == "xformers"
    assert found["phases_s"]["python"] == pytest.approx(1.0)
    assert found["peak_gib"] == [3.0, 3.0]


def test_a_ratio_is_to_the_best_plain_run_of_as_many_processes():
    def run(how, processes, rate):
        return {"how": how, "processes": processes, "tokens_per_second": rate}

    results = [run("plain", 2, 100), run("plain", 2, 200), run("plain", 4, 900)]
    assert show.ratio_to_plain(run("ours", 2, 500), results) == pytest.approx(2.5)
    assert show.ratio_to_plain(run("ours", 1, 500), results) is None


def test_scaling_is_to_the_same_kind_of_run_on_the_fewest_processes():
    def run(how, processes, rate, batch=16, **environment):
        return {
            "how": how,
            "processes": processes,
            "tokens_per_second": rate,
            "batch": batch,
            "environment": environment,
        }

    results = [run("plain", 1, 50), run("ours", 1, 100), run("ours", 1, 70, ABLATED="1"), run("plain", 1, 80, batch=4)]
    assert show.scaling(run("ours", 4, 384), results) == pytest.approx(0.96)
    assert show.scaling(run("plain", 2, 75), results) == pytest.approx(0.75)
    assert show.scaling(run("ours", 4, 384, OTHER="1"), results) is None
    assert show.scaling(results[1], results) is None
    assert show.scaling(run("ours", 4, 384), [run("ours", 2, 200)]) == pytest.approx(0.96)


def whole_run(mode):
    decisions = {"checkpointing": [mode, "why"]}
    return {"name": "2 x ours", "how": "ours", "processes": 2, "environment": {}, "decisions": decisions}


@pytest.mark.parametrize(("mode", "set_to"), [("none", "none"), ("unsloth", "unsloth"), ("unchanged", None)])
def test_taking_one_choice_back_keeps_the_others(mode, set_to):
    (fixed,) = [run for run in plan([1, 2], [16], batch=16) if "planned micro-batches" in run.name]
    found = pinned(fixed, [whole_run(mode) | {"processes": 1}, whole_run(mode)]).environment
    assert found["ACCELERATE_UNSLOTH_MICRO_BATCH"] == "fixed"
    assert found.get("ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING") == set_to
    assert pinned(fixed, [{"name": "2 x ours", "error": 1, "output": "killed"}]).environment == fixed.environment


def test_an_equal_share_scales_the_effective_batch_with_the_processes():
    work = Workload("model", "data", steps=1, effective_batch=64)
    assert work_of(Run("a", "ours", 1, 16), work, most_processes=4).effective_batch == 16
    assert work_of(Run("a", "ours", 4, 16), work, most_processes=4).effective_batch == 64
    with pytest.raises(BadParameter, match="effective batch 16 is not a multiple of batch 32"):
        work_of(Run("a", "plain", 1, 32), work, most_processes=4)


@pytest.mark.parametrize(
    ("trainer", "row", "tokens"),
    [
        ("sft", {"input_ids": [1] * 7}, 7),
        ("dpo", {"prompt_ids": [1] * 4, "chosen_ids": [1] * 3, "rejected_ids": [1] * 9}, 7 + 10),
        ("kto", {"prompt_ids": [1] * 4, "completion_ids": [1] * 9, "KL_completion_ids": [1] * 5, "label": True}, 10),
        ("orpo", {"prompt_input_ids": [1] * 4, "chosen_input_ids": [1] * 7, "rejected_input_ids": [1] * 10}, 17),
    ],
)
def test_tokens_are_those_of_the_truncated_rows(trainer, row, tokens):
    assert tokens_of(row, trainer, max_length=10) == tokens


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_third_of_the_characters_of_made_answers_is_the_prompts(tmp_path):
    rows = rows_of(make_data(tmp_path / "pairs.jsonl", "dpo", 500))
    prompts, chosen, rejected = ([len(row[name]) for row in rows] for name in ("prompt", "chosen", "rejected"))
    assert 0.25 < sum(prompts) / (sum(prompts) + sum(chosen)) < 0.4
    assert all(min(lengths) > 0 and max(lengths) > 3 * sum(lengths) / 500 for lengths in (chosen, rejected))
    assert max(prompts) < 1000
    assert all(row["prompt"].endswith("\n") and row["chosen"] != row["rejected"] for row in rows)
    assert rows == rows_of(make_data(tmp_path / "again.jsonl", "dpo", 500))


def test_made_answers_of_kto_have_labels_of_both_kinds(tmp_path):
    rows = rows_of(make_data(tmp_path / "answers.jsonl", "kto", 200))
    assert all(row.keys() == {"prompt", "completion", "label"} for row in rows)
    assert 100 < sum(row["label"] for row in rows) < 170


def test_the_last_error_is_that_of_a_rank_and_not_of_its_launcher():
    output = """
ValueError: handled
Traceback (most recent call last):
  File "worker.py", line 1, in <module>
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============
subprocess.CalledProcessError: Command died
"""
    assert last_error(output) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert last_error("one\nSegmentation fault\n") == "Segmentation fault"
    assert last_error("") == "no output"


def test_the_difference_of_losses_is_to_plain_with_the_same_effective_batch():
    def run(how, losses, effective_batch=8):
        return {"how": how, "losses": losses, "effective_batch": effective_batch}

    failed = {"how": "plain", "effective_batch": 8, "error": 1}
    results = [run("plain", [9.0], effective_batch=4), failed, run("plain", [2.0, 1.0])]
    assert show.loss_difference(run("ours", [2.0, 1.1]), results) == pytest.approx(0.1)
    assert show.loss_difference(results[2], results) is None
    assert show.loss_difference(run("ours", [2.0]), [failed]) is None


def planned(monkeypatch, tmp_path, *options):
    """The runs that the command would measure on two GPUs, and their workloads."""
    found = []
    monkeypatch.setattr(bench, "_measure_all", lambda *args: found.append(args))
    words = [
        "bench",
        "--model",
        str(tmp_path),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path),
        "--processes",
        "1,2",
    ]
    finished = CliRunner().invoke(app, [*words, *options])
    assert finished.exit_code == 0, finished.output
    runs, works, described, _ = found[0]
    return {run.name: (run, work) for run, work in zip(runs, works, strict=True)}, described


def test_the_notebook_preset_has_their_batches_on_each_process(monkeypatch, tmp_path):
    runs, described = planned(monkeypatch, tmp_path, "--preset", "notebook")
    assert [*runs] == ["1 x plain, batch 2", "1 x ours", "2 x plain, batch 2", "2 x ours"]
    for run, work in runs.values():
        assert (run.batch, work.effective_batch) == (2, 8 * run.processes)
        assert run.lora == {"use_gradient_checkpointing": "unsloth"}
        assert work.steps == 100
    assert described["equal_share"] is True


def test_an_option_takes_precedence_over_its_preset(monkeypatch, tmp_path):
    runs, _ = planned(
        monkeypatch, tmp_path, "--preset", "notebook", "--steps", "7", "--effective-batch", "32", "--no-with-trl"
    )
    assert {(work.steps, work.effective_batch) for _, work in runs.values()} == {(7, 16), (7, 32)}


def test_the_preset_of_small_gpus_limits_each_run_and_compares_recomputation(monkeypatch, tmp_path):
    runs, _ = planned(monkeypatch, tmp_path, "--preset", "small-gpu", "--processes", "2")
    ours = ["2 x ours", "2 x ours recomputing all layers", "2 x ours recomputing none"]
    each = ["2 x plain, batch 2", "2 x plain, batch 4", *ours]
    assert [*runs] == [f"{name}, {gib} GiB" for gib in (24, 16) for name in each]
    for name, (run, _) in runs.items():
        assert name.endswith(f"{run.gpu_gib:g} GiB")
    settings = [run.environment.get("ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING") for run, _ in runs.values()]
    assert settings == 2 * [None, None, None, "unsloth", "none"]


def test_scaling_and_ratios_are_among_runs_with_the_same_memory():
    def run(how, processes, rate, gpu_gib):
        named = {"how": how, "processes": processes, "tokens_per_second": rate, "gpu_gib": gpu_gib}
        return named | {"batch": 4, "environment": {}}

    results = [run("plain", 2, 100, 24), run("plain", 2, 50, 16), run("ours", 1, 60, 24), run("ours", 1, 50, 16)]
    assert show.ratio_to_plain(run("ours", 2, 100, 16), results) == 2
    assert show.scaling(run("ours", 2, 100, 16), results) == 1


# Plain runs import it as `unsloth`: the reference engine's loaders, and TRL's own trainers.
STAND_IN = """
from accelerate_unsloth import FastLanguageModel
from accelerate_unsloth.trainers import log_probs
log_probs.install()
"""


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory):
    """Return the folder and the figures of two epochs of a trainer: a plain run that fails, plain, and ours."""
    done = {}

    def run(trainer):
        if trainer not in done:
            done[trainer] = measure_three(trainer, tiny_model, tmp_path_factory.mktemp(trainer))
        return done[trainer]

    return run


def measure_three(trainer, model, folder):
    data = make_data(folder / "data.jsonl", trainer, 16, 4.0, 0.8)
    (folder / "unsloth.py").write_text(STAND_IN)
    (folder / "broken").mkdir()
    (folder / "broken" / "unsloth.py").write_text("raise RuntimeError('Unsloth: [no] GPU')")
    work = Workload(
        str(model), str(data), 4, 8, 128, load_in_4bit=False, optim="adamw_torch", cpu=True, trainer=trainer
    )
    runs = [
        Run("broken", "plain", 1, 2, path_with(folder / "broken")),
        Run("plain", "plain", 1, 2, path_with(folder)),
        Run("ours", "ours", 2, 2),
    ]
    return folder, [measure(run, work, folder / run.name, timeout_s=240) for run in runs]


def path_with(folder):
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def counted_tokens(folder, processes):
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return sum(rank["ends"][-1][1] for rank in ranks)


@pytest.mark.launch
@pytest.mark.parametrize(
    "trainer", ["dpo", pytest.param("kto", marks=pytest.mark.slow), pytest.param("orpo", marks=pytest.mark.slow)]
)
def test_plain_and_ours_train_on_the_same_preferences(measured, trainer):
    folder, (_, plain, ours) = measured(trainer)
    assert "error" not in plain and "error" not in ours, (plain, ours)
    assert counted_tokens(folder / "ours", 2) == counted_tokens(folder / "plain", 1)
    assert ours["tokens_per_second"] > 0
    # KTO and ORPO estimate a part of the loss in each micro-batch of the plain run.
    tolerance = {"dpo": 1e-5, "kto": 0.1, "orpo": 0.02}[trainer]
    assert show.loss_difference(ours, [plain, ours]) < tolerance
    if trainer == "dpo":
        assert plain["losses"][0] == pytest.approx(0.693147, rel=1e-4)


@pytest.mark.launch
def test_a_run_that_fails_is_in_the_table_with_its_error(measured, capsys):
    _, results = measured("dpo")
    assert results[0]["reason"] == "RuntimeError: Unsloth: [no] GPU"
    show.print_table(results)
    shown = capsys.readouterr().out
    assert "broken: failed with status 1: RuntimeError: Unsloth: [no] GPU" in shown
    assert "ours" in shown


@pytest.mark.slow
@pytest.mark.launch
def test_the_quick_form_measures_one_and_two_cpu_processes(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from accelerate_unsloth.commands import app; app()",
        "bench",
        "--quick",
        "--out",
        tmp_path,
    ]
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean_environment(), cwd=ROOT, timeout=240
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    one, two = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["tokens_per_second"] > 0
    assert one["peak_host_gib"] > 0.1
    assert set(two["phases_s"]) >= {"imported", "loaded", "first step", "saved"}
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "2 x ours" in finished.stdout
    assert {one["attention"], two["attention"]} == {"sdpa"}
