"""What `accelerate-unsloth env` says: verdicts from plain values, and the command in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from accelerate_unsloth.commands.env import (
    choices,
    compiled_cache,
    examine,
    hardware,
    launcher,
    libraries,
    probe,
    space,
)
from accelerate_unsloth.commands.env.finding import NOTE, OK, PROBLEM
from accelerate_unsloth.commands.env.versions import compare
from accelerate_unsloth.devices.manager import Device

from ..launching import ROOT, clean_environment

TORCH = {"version": "2.14.1+cu130", "cuda": "13.0", "gpus": 2, "why_no_gpu": ""}
NMS = "RuntimeError: operator torchvision::nms does not exist"


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
def test_a_version_is_held_against_its_range(required, version, engine, verdict):
    (finding,) = compare([required], lambda name: version, engine)
    assert finding.verdict == verdict
    assert bool(finding.remedy) is (verdict != OK)


def test_requirements_of_extras_are_passed_over():
    assert compare(['pytest>=8; extra == "test"', "rich>=13"], lambda name: "99", None)[0].subject == "rich"


@pytest.mark.parametrize(
    ("name", "record", "verdict", "words"),
    [
        ("torch", TORCH, OK, "2.14.1+cu130"),
        ("torch", {"missing": True}, PROBLEM, "not installed"),
        ("torch", {"error": "ImportError: libcudart.so.13"}, PROBLEM, "libcudart"),
        ("torchvision", {"error": NMS}, PROBLEM, "torchvision::nms"),
        ("torchvision", {"missing": True}, OK, "not installed"),
        ("xformers", {"error": "xFormersInvalidLibException: built for\n  another torch"}, NOTE, "for another torch"),
        ("xformers", {"missing": True}, OK, "not installed"),
    ],
)
def test_an_import_that_fails_gets_the_verdict_it_deserves(name, record, verdict, words):
    finding = libraries.judge(name, record, "2.14.1+cu130")
    assert finding.verdict == verdict
    assert words in finding.value


def test_the_remedy_for_a_wrong_torchvision_names_the_index_of_this_torch():
    assert "/whl/cpu" in libraries.judge("torchvision", {"error": NMS}, "2.14.1+cpu").remedy


@pytest.mark.parametrize(
    ("torch", "seen_by_driver", "verdict", "words"),
    [
        (TORCH, 2, OK, "can use 2"),
        (TORCH | {"gpus": 0}, 0, OK, "can use 0"),
        (TORCH | {"gpus": 0, "cuda": None, "version": "2.14.1+cpu"}, 2, PROBLEM, "2 GPU(s), but torch 2.14.1+cpu has"),
        (TORCH | {"gpus": 0, "why_no_gpu": "driver is too old"}, 2, PROBLEM, "driver is too old"),
    ],
)
def test_a_torch_that_misses_the_gpus_is_a_problem(torch, seen_by_driver, verdict, words):
    finding = libraries.findings(libraries.Loaded({"torch": torch}), seen_by_driver)[-1]
    assert finding.verdict == verdict
    assert words in finding.value


def test_a_crash_is_laid_to_the_import_that_had_begun():
    output = '{"begin": "torch"}\n{"library": "torch", "version": "2"}\n{"begin": "torchvision"}\n'
    loaded = libraries.read(output, "crashed with SIGSEGV")
    assert loaded.crashed_in == "torchvision"
    assert loaded.records == {"torch": {"version": "2"}}


STAMP = '"""\n{}\n__UNSLOTH_VERSIONING__\n"""\n# code\n'
INSTALLED = {"unsloth_zoo": "2026.10.7", "unsloth": "2026.10.6", "transformers": "5.17.0", "trl": "1.15.0"}


@pytest.mark.parametrize(
    ("stamp", "verdict", "words"),
    [
        ("2026.10.7\n2026.10.6\n5.17.0\n1.15.0", OK, "2 file(s) of the installed versions"),
        ("2026.10.7\n2026.9.1\n5.17.0\n1.15.0", NOTE, "(unsloth 2026.9.1, installed 2026.10.6)"),
        ("2026.10.7\n2026.10.6\n5.16.0\n1.15.0", NOTE, "1 of 2 file(s)"),
        ("2026.3.1", NOTE, "stamped 2026.3.1"),
    ],
)
def test_a_compiled_cache_of_other_versions_is_stale(stamp, verdict, words, tmp_path):
    (tmp_path / "UnslothSFTTrainer.py").write_text(STAMP.format(stamp))
    (tmp_path / "current.py").write_text(STAMP.format("\n".join(INSTALLED.values())))
    (tmp_path / "no_stamp.py").write_text("x = 1\n")
    (finding,) = compiled_cache.findings(tmp_path, INSTALLED.get)
    assert finding.verdict == verdict
    assert words in finding.value


def test_the_stamp_is_the_one_that_unsloth_writes():
    """Unsloth cannot compile without a GPU, so its own source is held against the reader."""
    from importlib.util import find_spec
    from pathlib import Path

    source = (Path(find_spec("unsloth_zoo").submodule_search_locations[0]) / "compiler.py").read_text()
    stamp = source[source.index("versioning = (") :].split(")\n")[0]
    places = [stamp.index(f"{{{name}_version}}") for name in compiled_cache._STAMPED]
    assert places == sorted(places)
    assert compiled_cache._END_OF_STAMP in stamp


def test_no_cache_is_no_finding(tmp_path):
    assert compiled_cache.findings(tmp_path / "absent")[0].value == "none yet"


def test_the_launcher_is_shown_and_secrets_are_not():
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
        "NCCL_DEBUG": "INFO",
    }
    shown = " ".join(finding.value for finding in launcher.findings(variables))
    assert "RANK=1, WORLD_SIZE=4" in shown
    assert "NCCL_DEBUG=INFO" in shown
    assert "secret" not in shown


def test_no_launcher_is_said_so():
    assert "none" in launcher.findings({})[0].value


@pytest.mark.parametrize(("free_gib", "verdict"), [(50, OK), (5, NOTE), (0.1, PROBLEM)])
def test_space_runs_out_in_two_steps(free_gib, verdict, tmp_path):
    assert space.judge("disk", tmp_path, free_gib, scarce_gib=10, least_gib=0.5, remedy="free some").verdict == verdict


@pytest.mark.parametrize(
    ("device", "verdict", "words"),
    [
        ({}, OK, "139.0 of 140.0 GiB free"),
        ({"free_gib": 70.0}, NOTE, "70.0 of 140.0"),
        ({"compute_capability": (7, 5), "bf16": False}, NOTE, "no bfloat16"),
        ({"compute_capability": (6, 1), "bf16": False}, NOTE, "Unsloth needs 7.0"),
    ],
)
def test_a_gpu_is_described_with_what_hinders_it(device, verdict, words):
    plain = {"total_gib": 140.0, "free_gib": 139.0, "compute_capability": (9, 0), "bf16": True}
    (finding,) = hardware.findings([Device(0, 0, "GPU-0", "H200", **plain | device)], [], None)
    assert finding.verdict == verdict
    assert words in f"{finding.value} {finding.remedy}"


def test_each_pair_of_gpus_is_listed_once():
    links = [{1: "NV18", 2: "SYS"}, {0: "NV18", 2: "SYS"}, {0: "SYS", 1: "SYS"}]
    devices = [Device(i, i, f"GPU-{i}", "H200", 140.0, 140.0, (9, 0), True, links[i]) for i in range(3)]
    assert hardware.findings(devices, [], None)[-1].value == "NV18: 0-1; SYS: 0-2, 1-2"


def command(*words, variables=None, folder=ROOT):
    program = "from accelerate_unsloth.commands import app; app()"
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=folder,
        env=clean_environment(variables), timeout=120,
    )  # fmt: skip


def test_the_command_prints_a_table_and_status_0_where_training_works(tmp_path):
    stale = tmp_path / "unsloth_compiled_cache"
    stale.mkdir()
    (stale / "old.py").write_text(STAMP.format("1\n2\n3\n4"))
    done = command("env", variables={"HF_TOKEN": "hf_secret"}, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training can work here." in done.stdout
    assert "reference: no GPU is visible" in done.stdout
    assert "1 of 1 file(s)" in done.stdout
    assert "hf_secret" not in done.stdout


def test_broken_imports_are_reported_as_json_with_status_1(tmp_path):
    """A torchvision of another build, a PEFT that asks for more than there is, and a trl that takes its process down."""
    broken = {
        "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
        "peft": "from accelerate import not_there",
        "trl": "import os; os.kill(os.getpid(), 9)",
    }
    for name, code in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    done = command("env", "--json", variables={"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    problems = {f["subject"]: f["value"] for f in report["findings"] if f["verdict"] == PROBLEM}
    remedies = {f["subject"]: f["remedy"] for f in report["findings"]}
    assert report["can_train"] is False
    assert "Mend torchvision first" in remedies["import transformers"]  # which hides the error behind one of its own
    assert problems["import torchvision"] == NMS
    assert "cannot import name 'not_there'" in problems["import peft"]
    assert problems["import trl"] == "crashed with SIGKILL"


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise ImportError('libcudart.so.13')", "libcudart"), ("import os; os.kill(os.getpid(), 11)", "SIGSEGV")],
)
def test_a_torch_that_cannot_be_imported_is_reported(code, said, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    done = command("env", "--json", variables={"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})
    assert done.returncode == 1, done.stderr
    findings = {f["subject"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["import torch"]["verdict"] == PROBLEM
    assert said in findings["import torch"]["value"]
    assert "attention" in findings


def test_the_first_cause_of_an_error_is_found():
    try:
        try:
            raise RuntimeError("first")
        except RuntimeError as first:
            raise ImportError("second") from first
    except ImportError as error:
        assert str(probe._first_of(error)) == "first"


def test_an_import_that_fails_for_another_ones_sake_points_to_that_one():
    causes = {"torchvision": NMS, "transformers": NMS, "trl": "something else"}
    records = {name: {"error": f"ImportError: no {name}", "cause": cause} for name, cause in causes.items()}
    loaded = libraries.Loaded({"torch": TORCH, **records})
    remedies = {finding.subject: finding.remedy for finding in libraries.findings(loaded, seen_by_driver=2)}
    assert "Mend torchvision first" in remedies["import transformers"]
    assert remedies["import trl"] == "Reinstall trl."


def test_what_is_not_installed_is_said_once():
    loaded = libraries.Loaded({"torch": TORCH, "trl": {"missing": True}, "bitsandbytes": {"missing": True}})
    verdicts = {finding.subject: finding.verdict for finding in libraries.findings(loaded, seen_by_driver=2)}
    assert "import trl" not in verdicts  # the versions say it
    assert verdicts["import bitsandbytes"] == NOTE


def test_a_launch_on_gpus_imports_unsloth_and_one_on_the_cpu_does_not():
    assert {"unsloth", "bitsandbytes"} <= {load.__name__ for load in probe.to_load(visible_gpus=1)}
    assert {"unsloth", "bitsandbytes"}.isdisjoint(load.__name__ for load in probe.to_load(visible_gpus=0))


@pytest.mark.parametrize(("variable", "place"), [("HF_HUB_CACHE", "{}"), ("HF_HOME", "{}/hub")])
def test_the_hubs_cache_is_where_the_hub_looks(variable, place, tmp_path):
    program = "from accelerate_unsloth.commands.env import space; from pathlib import Path; print(space.findings(Path())[1].value)"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=clean_environment({variable: str(tmp_path)}),
    )
    assert finished.stdout.endswith(f"free in {place.format(tmp_path)}\n"), finished.stderr


def test_options_that_cannot_be_are_a_problem(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_ENGINE", "unsloth")
    chosen = choices.findings(visible_gpus=0)
    assert chosen.engine is None
    assert not examine.can_train(chosen.findings)


def shown(visible_gpus, total_gib=79.6, kernels=None):
    devices = [Device(i, i, f"GPU-{i}", "H100", total_gib, total_gib, (9, 0), True) for i in range(visible_gpus)]
    findings = choices.findings(visible_gpus, devices, kernels).findings
    return [(finding.subject, finding.value) for finding in findings]


SEGMENTS = {"sdpa_runs_segments": True, "other": "", "prefers_cudnn": True, "has_varlen": True}


def test_every_policy_is_shown_as_it_would_be_on_these_gpus():
    values = shown(4, kernels=SEGMENTS)
    assert [subject for subject, _ in values] == [
        "engine", "gradient sync", "gradient sync", "attention", "gradient checkpointing", "micro-batches",
    ]  # fmt: skip
    texts = [value for _, value in values]
    assert texts[0].startswith("unsloth: 4 GPU(s)")
    assert "4 process(es): after_backward" in texts[1]
    assert "4 process(es): overlapped" in texts[2]
    assert "1,000 different lengths: varlen: all rows" in texts[3]
    assert ": none: " in texts[4]
    assert ": auto: at most " in texts[5]


def test_policies_follow_the_memory_the_kernels_and_the_options(monkeypatch):
    assert ": unsloth: " in dict(shown(1, total_gib=11.0))["gradient checkpointing"]
    assert "does not fit 6.0 GiB" in dict(shown(1, total_gib=6.0))["gradient checkpointing"]
    assert (
        "xformers runs"
        in dict(shown(1, kernels=SEGMENTS | {"sdpa_runs_segments": False, "other": "xformers runs rows"}))["attention"]
    )
    assert "attention" not in dict(shown(1))  # Unsloth could not be asked
    assert ": unchanged: the reference engine" in dict(shown(0))["attention"]
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MICRO_BATCH", "fixed")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_ATTENTION", "varlen")
    values = dict(shown(1, kernels=SEGMENTS | {"has_varlen": False}))
    assert values["micro-batches"].endswith("fixed: asked for")
    assert ": unchanged: memory is not planned here" in values["gradient checkpointing"]
    assert "attention='varlen' cannot be had here" in values["attention"]
