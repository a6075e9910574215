"""The benchmark: which runs, which figures, and a small one for real."""

import json
import subprocess
import sys

import pytest

from accelerate_unsloth.bench import show
from accelerate_unsloth.bench.plans import plan
from accelerate_unsloth.bench.runs import figures

from .launching import ROOT, clean_environment


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
    assert {run.processes for run in runs if run.environment} == {2}


def clocks(ends):
    phases = ("python", "imported", "loaded", "adapters", "trainer", "first step", "trained", "saved")
    at = {"launched": 100.0} | {phase: 101.0 + turn for turn, phase in enumerate(phases)}
    return {"phases": at, "ends": ends, "peak_gib": 3.0, "losses": [2.0], "decisions": {}}


def test_the_figures_are_those_of_the_clocks():
    # Steps end at 0, 1, 3 and 5 s; the first rank has collated 10 tokens more in each, the second 30.
    first = clocks([(0.0, 10), (1.0, 20), (3.0, 30), (5.0, 40)])
    second = clocks([(0.0, 30), (0.9, 60), (2.9, 90), (4.9, 120)])
    found = figures([first, second], ended_s=110.0)
    assert found["tokens_per_second"] == pytest.approx(20.0)  # 40 tokens in each of the last two steps of 2 s
    assert found["step_s"] == pytest.approx(2.0)
    assert found["imbalance"] == pytest.approx(1.5)
    assert found["end_to_end_s"] == pytest.approx(10.0)
    assert found["phases_s"]["python"] == pytest.approx(1.0)
    assert found["peak_gib"] == [3.0, 3.0]


def test_a_ratio_is_to_the_best_plain_run_of_as_many_processes():
    def run(how, processes, rate):
        return {"how": how, "processes": processes, "tokens_per_second": rate}

    results = [run("plain", 2, 100), run("plain", 2, 200), run("plain", 4, 900)]
    assert show.ratio_to_plain(run("ours", 2, 500), results) == pytest.approx(2.5)
    assert show.ratio_to_plain(run("ours", 1, 500), results) is None


@pytest.mark.slow
@pytest.mark.launch
def test_the_quick_form_measures_one_and_two_cpu_processes(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from accelerate_unsloth.cli import app; app()",
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
