"""The machinery of the GPU tests, on the CPU: many cases in one launch, and what a case that fails costs."""

import json
import re
import subprocess
import sys

import psutil
import pytest

from accelerate_unsloth.launch.channel import channel

from ..gpu import cases, launches
from ..launching import ROOT, WORKERS, clean_environment, launch

pytestmark = pytest.mark.launch

THREE_STEPS = {"args": {"max_steps": 3}, "measure": True}


def fail(case, ranks):
    """A case for the tests below: an error on some ranks, for which the others wait."""
    if case.rank in ranks:
        raise KeyError(f"provoked on rank {case.rank}")
    return {"waited for": channel().gather("never on all ranks", case.rank)}


def entry(name, function, **options):
    return {"name": name, "function": function, "options": options}


def broken(name, ranks):
    return entry(name, f"{__name__}:fail", ranks=ranks)


def trained(name, **options):
    return entry(name, "tests.gpu.cases.training:fine_tune", **THREE_STEPS | options)


@pytest.fixture(scope="module")
def run(tiny_model, uneven_data, tmp_path_factory):
    """Run cases in as few launches of two processes as it takes: their results by name and rank, and the launches."""

    def start(entries, patience_s=60):
        folder = tmp_path_factory.mktemp("cases")
        materials = folder / "materials"
        materials.mkdir()
        (materials / "real").symlink_to(tiny_model)
        (materials / "uneven.jsonl").symlink_to(uneven_data)
        finished = []

        def run_plan(plan):
            plan.write_text(json.dumps(json.loads(plan.read_text()) | {"patience_s": patience_s}))
            environment = {"HF_HOME": str(folder / "cache"), "ACCELERATE_UNSLOTH_REPORT": "0"}
            finished.append(launch(WORKERS / "run_cases.py", [plan], 2, environment))
            return finished[-1].output

        launches.run_cases(entries, folder / "two", folder, 2, run_plan)
        names = [entry["name"] for entry in entries]
        files = {name: [folder / "two" / name / f"result{rank}.json" for rank in (0, 1)] for name in names}
        return {
            name: [json.loads(file.read_text()) for file in of_ranks] for name, of_ranks in files.items()
        }, finished

    return start


@pytest.fixture(scope="module")
def one_launch(run):
    scripts = "tests.gpu.cases.scripts:run"
    return run(
        [
            entry("notebook", scripts, script="unsloth_notebook.py"),
            entry("explicit", scripts, script="unsloth_recent.py", explicit=True),
            trained("first"),
            broken("failing", [0, 1]),
            trained("again"),
            trained("shared", frozen_weights="host", decode=True),
            trained("partly", recompute_first=1),
            entry("frozen", "tests.gpu.cases.training:change_a_frozen_weight"),
        ]
    )


def test_all_cases_run_in_one_launch_though_one_of_them_fails_on_all_ranks(one_launch):
    results, launches = one_launch
    assert [finished.status for finished in launches] == [0]
    for rank in (0, 1):
        assert f"provoked on rank {rank}" in results["failing"][rank]["error"]
    assert not [name for name, ranks in results.items() if name != "failing" and any("error" in r for r in ranks)]


def test_a_case_leaves_the_next_one_nothing(one_launch):
    first, again = (one_launch[0][name][0]["value"] for name in ("first", "again"))
    assert len(first["losses"]) == 3
    assert again == first


@pytest.mark.parametrize(
    ("name", "different"),
    [("shared", {"frozen_weights": "host", "decoded_alike": 1.0}), ("partly", {"checkpointing": "1 of 2 layers"})],
)
def test_shared_weights_and_partial_recomputation_change_no_loss(one_launch, name, different):
    first, other = (one_launch[0][case][0]["value"] for case in ("first", name))
    assert different.items() <= other.items()
    assert other["losses"] == pytest.approx(first["losses"], rel=1e-5)
    assert other["gradient_norms"] == pytest.approx(first["gradient_norms"], rel=1e-4)


def test_scripts_run_one_after_the_other_in_one_process(one_launch):
    explicit, notebook = (one_launch[0][name][0]["value"]["losses"] for name in ("explicit", "notebook"))
    assert len(explicit) == 6
    assert notebook == explicit


def test_one_bit_of_a_frozen_weight_is_found_on_every_rank(one_launch):
    for result in one_launch[0]["frozen"]:
        changed, as_before = result["value"]["said"]
        assert result["value"]["changed"] in changed
        assert as_before == ""


def test_a_case_that_fails_on_one_rank_costs_a_launch_and_no_other_result(run):
    results, launches = run([trained("before"), broken("failing", [1]), trained("after")], patience_s=2)
    assert len(launches) == 2
    assert launches[0].status != 0
    assert launches[1].status == 0
    assert "provoked on rank 1" in results["failing"][1]["error"]
    assert "error" in results["failing"][0]
    assert results["after"][0]["value"] == results["before"][0]["value"]


@pytest.fixture
def suite(tiny_model, tmp_path, monkeypatch):
    """A session that wants a checkpoint of two processes, and a run of one that goes on from it: on the CPU."""
    monkeypatch.setenv("MODEL", str(tiny_model))
    wanted = {"two": ["life"], "one": ["life-resumed"], "margin": []}
    made = launches.Suite(tmp_path / "launches", wanted, ["", ""], config="unsloth_ddp_cpu")
    yield made
    made.close()


@pytest.mark.slow
def test_a_session_runs_two_processes_first_and_resumes_on_one(suite):
    resumed = suite.outcome("one", "life-resumed")
    assert resumed["losses"] == pytest.approx(suite.outcome("two", "life", rank=1)["losses"], rel=1e-5)
    assert (suite.folder / "two" / "life" / "merged").is_dir()
    assert [line.split()[0] for line in suite.times()] == ["launch", "launch", "two/life", "one/life-resumed"]


@pytest.mark.slow
def test_a_launch_that_does_not_end_fails_its_cases_and_leaves_no_process(suite, monkeypatch):
    monkeypatch.setattr(launches, "TIMEOUT_S", 2)
    with pytest.raises(AssertionError, match="no end after 2 s"):
        suite.outcome("two", "life")
    left = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in left if "run_cases.py" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def wanted():
    """The cases that launches would run if there were two GPUs: for all GPU tests, and for those that `-k` selects."""
    script = (
        "import json, pytest\n"
        "from tests.gpu import conftest\n"
        "class Plugin:\n"
        "    def pytest_collection_finish(self, session):\n"
        "        print('wanted', json.dumps(conftest.wanted_cases(session.items)))\n"
        "conftest.count_gpus = lambda: 2\n"
        "for expression in ('', 'moe or fraction_is_obeyed'):\n"
        "    pytest.main(['tests/gpu', '--collect-only', '-q', '-k', expression], plugins=[Plugin()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=clean_environment()
    )
    return [json.loads(found) for found in re.findall(r"^wanted (.*)$", done.stdout, re.MULTILINE)]


def test_every_case_is_read_by_a_test_and_every_function_is_there(wanted):
    assert {launch: set(names) for launch, names in wanted[0].items()} == {
        launch: set(names) for launch, names in cases.CASES.items()
    }
    for of_launch in cases.CASES.values():
        for function, _ in of_launch.values():
            module, name = function.split(":")
            source = (ROOT / "tests" / "gpu" / "cases" / f"{module}.py").read_text()
            assert re.search(rf"^def {name}\(\s*case,?", source, re.MULTILINE)


def test_only_the_cases_of_the_selected_tests_are_run(wanted):
    assert wanted[1] == {"two": ["moe"], "one": [], "margin": ["fraction"]}
