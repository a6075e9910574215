"""What `accelerate-unsloth env` reports: verdicts from plain values, and the command in another process."""

import json
import os
import subprocess
import sys

import pytest

from accelerate_unsloth.commands.env import can_train, checks, choices, imports
from accelerate_unsloth.commands.env.checks import NOTE, OK, PROBLEM
from accelerate_unsloth.devices.manager import Device

from ..launching import ROOT, clean_environment

TORCH = {"version": "2.14.1+cu130", "cuda": "13.0", "gpus": 2, "warning": ""}
NMS = "RuntimeError: operator torchvision::nms does not exist"


# ---- Versions, GPUs, variables, space ----


@pytest.mark.parametrize(
    ("required", "version", "engine", "verdict"),
    [
        ("trl<1.16,>=1.15.0", "1.15.0", "unsloth", OK),
        ("trl<1.16,>=1.15.0", "1.16.2", "unsloth", NOTE),
        ("trl<1.16,>=1.15.0", "1.14.0", "unsloth", NOTE),
        ("torch<2.15,>=2.11", "2.11.0+cu130", "unsloth", OK),
        ("torch<2.15,>=2.11", "2.13.0.dev20261001", "unsloth", OK),
        ("trl<1.16,>=1.15.0", None, "reference", PROBLEM),
        ("unsloth>=2026.10.6", None, "unsloth", PROBLEM),
        ("unsloth>=2026.10.6", None, "reference", NOTE),
        ("unsloth>=2026.10.6", None, None, NOTE),
    ],
)
def test_a_version_is_compared_with_its_range(required, version, engine, verdict):
    (finding,) = checks.compare_versions([required], lambda name: version, engine)
    assert finding.verdict == verdict
    assert bool(finding.fix) is (verdict != OK)


def test_requirements_of_extras_are_left_out():
    (finding,) = checks.compare_versions(['pytest>=8; extra == "test"', "rich>=13"], lambda name: "99", None)
    assert finding.subject == "rich"


@pytest.mark.parametrize(
    ("device", "verdict", "words"),
    [
        ({}, OK, "139.0 of 140.0 GiB free"),
        ({"free_gib": 70.0}, NOTE, "70.0 of 140.0"),
        ({"compute_capability": (7, 5), "bf16": False}, NOTE, "no bfloat16"),
        ({"compute_capability": (6, 1), "bf16": False}, NOTE, "Unsloth needs 7.0"),
    ],
)
def test_a_gpu_is_described_with_its_limits(device, verdict, words):
    plain = {"total_gib": 140.0, "free_gib": 139.0, "compute_capability": (9, 0), "bf16": True}
    (finding,) = checks.check_gpus([Device(0, 0, "GPU-0", "H200", **plain | device)], [], None)
    assert finding.verdict == verdict
    assert words in f"{finding.value} {finding.fix}"


def test_only_known_variables_are_listed(monkeypatch):
    for name, value in {"RANK": "1", "NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "WANDB_API_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_UNSLOTH_REPORT", "0")
    (finding,) = checks.list_variables()
    for known in ("RANK=1", "NCCL_DEBUG=INFO", "ACCELERATE_UNSLOTH_REPORT=0"):
        assert known in finding.value
    assert "secret" not in finding.value


@pytest.mark.parametrize(
    ("least_gib", "scarce_gib", "verdict"), [(0, 0, OK), (0, 10**9, NOTE), (10**9, 10**9, PROBLEM)]
)
def test_scarce_space_is_a_note_and_no_space_a_problem(least_gib, scarce_gib, verdict, tmp_path):
    finding = checks.judge_space("disk", tmp_path / "not" / "yet", scarce_gib, least_gib, "free some")
    assert finding.verdict == verdict


@pytest.mark.parametrize(("variable", "folder"), [("HF_HUB_CACHE", "{}"), ("HF_HOME", "{}/hub")])
def test_the_hubs_cache_is_where_the_hub_looks(variable, folder, tmp_path):
    program = "from accelerate_unsloth.commands.env import checks; print([*checks.check_space()][1].value)"
    environment = clean_environment({variable: str(tmp_path)})
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert finished.stdout.endswith(f"free in {folder.format(tmp_path)}\n"), finished.stderr


# ---- Imports ----


def findings_of(records, gpus_of_driver=2):
    return {finding.subject: finding for finding in imports.check_imports(records, gpus_of_driver)}


@pytest.mark.parametrize(
    ("name", "record", "verdict", "words"),
    [
        ("trl", {"version": "1.15.0"}, OK, "1.15.0"),
        ("torch", {"error": "ImportError: libcudart.so.13"}, PROBLEM, "libcudart"),
        ("torchvision", {"error": NMS}, PROBLEM, "torchvision::nms"),
        ("torchvision", {"missing": True}, OK, "not installed"),
        ("xformers", {"error": "xFormersInvalidLibException: built for\n  another torch"}, NOTE, "for another torch"),
    ],
)
def test_a_failed_import_is_judged_by_what_needs_it(name, record, verdict, words):
    finding = findings_of({name: record})[f"import {name}"]
    assert finding.verdict == verdict
    assert words in finding.value


def test_a_later_failure_points_to_the_first_and_a_missing_requirement_is_left_to_the_versions():
    records = {"torchvision": {"error": NMS}, "transformers": {"error": "ImportError"}, "trl": {"missing": True}}
    findings = findings_of(records)
    assert "Fix torchvision first" in findings["import transformers"].fix
    assert "import trl" not in findings


@pytest.mark.parametrize(
    ("torch", "gpus_of_driver", "value", "fix"),
    [
        (TORCH, 2, None, ""),
        (TORCH | {"gpus": 0}, 0, None, ""),
        (TORCH | {"gpus": 0, "cuda": None}, 2, "2.14.1+cu130 can use none of 2 GPU(s)", "Install a CUDA build"),
        (TORCH | {"gpus": 0, "warning": "driver is too old"}, 2, "driver is too old", "Update NVIDIA's driver"),
    ],
)
def test_a_torch_that_cannot_use_the_gpus_is_a_problem(torch, gpus_of_driver, value, fix):
    finding = findings_of({"torch": torch}, gpus_of_driver).get("torch and GPUs")
    if value is None:
        assert finding is None
    else:
        assert finding.verdict == PROBLEM
        assert value in finding.value
        assert fix in finding.fix


def test_a_launch_on_gpus_imports_unsloth_and_one_on_the_cpu_does_not():
    assert {"unsloth", "bitsandbytes"} <= imports.statements_for(visible_gpus=1).keys()
    assert {"unsloth", "bitsandbytes"}.isdisjoint(imports.statements_for(visible_gpus=0))


# ---- The command ----


def command(*words, variables=None, folder=ROOT):
    program = "from accelerate_unsloth.commands import app; app()"
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=folder,
        env=clean_environment(variables), timeout=120,
    )  # fmt: skip


def report_with_broken(packages, folder):
    """Run the command where packages are replaced by one line of code each, and check that it ends with status 1."""
    for name, code in packages.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    done = command("env", "--json", variables={"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])})
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["can_train"] is False
    return {finding["subject"]: finding for finding in report["findings"]}


def test_the_command_prints_a_table_and_ends_with_status_0_where_training_works(tmp_path):
    done = command("env", variables={"HF_TOKEN": "hf_secret"}, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training can work here." in done.stdout
    assert "reference: no GPU is visible" in done.stdout
    assert "hf_secret" not in done.stdout


def test_broken_imports_are_reported_as_json_with_status_1(tmp_path):
    """A torchvision of another build, a PEFT that needs another accelerate, and a TRL that crashes the process."""
    broken = {
        "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
        "peft": "from accelerate import not_there",
        "trl": "import os; os.kill(os.getpid(), 9)",
    }
    findings = report_with_broken(broken, tmp_path)
    assert findings["import torchvision"]["value"] == NMS
    assert "Fix torchvision first" in findings["import transformers"]["fix"]  # whose error hides that of torchvision
    assert "cannot import name 'not_there'" in findings["import peft"]["value"]
    assert findings["import trl"]["value"] == "crashed with SIGKILL"


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise ImportError('libcudart.so.13')", "libcudart"), ("import os; os.kill(os.getpid(), 11)", "SIGSEGV")],
)
def test_a_torch_that_cannot_be_imported_is_reported(code, said, tmp_path):
    findings = report_with_broken({"torch": code}, tmp_path)
    assert findings["import torch"]["verdict"] == PROBLEM
    assert said in findings["import torch"]["value"]
    assert "attention" in findings


# ---- Choices ----

SEGMENTS = {"sdpa_runs_segments": True, "other": "", "prefers_cudnn": True, "has_varlen": True}


def chosen(visible_gpus, total_gib=79.6, kernels=None):
    devices = [Device(i, i, f"GPU-{i}", "H100", total_gib, total_gib, (9, 0), True) for i in range(visible_gpus)]
    _, findings = choices.check_choices(visible_gpus, devices, kernels)
    return {finding.subject: finding.value for finding in findings}


def test_every_choice_is_shown_as_it_would_be_on_these_gpus():
    values = chosen(4, kernels=SEGMENTS)
    assert list(values) == ["engine", "attention", "step plan", "activations", "micro-batches"]
    assert values["engine"].startswith("unsloth: 4 GPU(s)")
    assert "1,000 different lengths: varlen: all rows" in values["attention"]
    assert values["step plan"].startswith("for 8B, with the dims of Llama-3.1-8B")
    assert values["activations"].startswith("kept")
    assert values["micro-batches"].startswith("at most ")


def test_choices_follow_the_memory_the_kernels_and_the_options(monkeypatch):
    assert chosen(1, total_gib=11.0)["activations"].startswith("recomputed")
    assert "does not fit 6.0 GiB" in chosen(1, total_gib=6.0)["step plan"]
    others = SEGMENTS | {"sdpa_runs_segments": False, "other": "xformers runs rows"}
    assert "xformers runs" in chosen(1, kernels=others)["attention"]
    assert "attention" not in chosen(1)  # Unsloth could not be imported
    assert ": unchanged: the reference engine" in chosen(0)["attention"]
    assert "memory is planned on GPUs only" in chosen(0)["step plan"]
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MICRO_BATCH", "fixed")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_ATTENTION", "varlen")
    values = chosen(1, kernels=SEGMENTS | {"has_varlen": False})
    assert values["micro-batches"].startswith("as the script splits them: asked for")
    assert "attention='varlen' is not available here" in values["attention"]


def test_impossible_options_are_a_problem(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_ENGINE", "unsloth")
    engine, findings = choices.check_choices(visible_gpus=0)
    assert engine is None
    assert not can_train(findings)
