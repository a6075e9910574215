"""Accelerate files, bundled and written, by Accelerate's own loader, and the command that finds and writes them."""

import os
import pty
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from accelerate_unsloth.commands import app
from accelerate_unsloth.launch import command, configs

from ..launching import clean_environment, finish, start


@pytest.mark.parametrize("name", configs.names())
def test_accelerate_loads_the_file(name):
    config = load_config_from_file(str(configs.path(name)))
    assert str(config.distributed_type).endswith("NO" if name == "unsloth_single_gpu" else "MULTI_GPU")


def test_the_four_files_are_there():
    assert configs.names() == ["unsloth_ddp", "unsloth_ddp_cpu", "unsloth_ddp_multinode", "unsloth_single_gpu"]


def invoke(*words):
    return CliRunner().invoke(app, list(words))


def test_config_path_prints_a_file_that_exists():
    result = invoke("config", "path", "unsloth_ddp")
    assert result.exit_code == 0
    assert configs.path("unsloth_ddp").samefile(result.stdout.strip())


def test_config_list_and_show():
    assert invoke("config", "list").stdout.split() == configs.names()
    assert invoke("config", "show", "unsloth_ddp.yaml").stdout == configs.path("unsloth_ddp").read_text()


def test_an_unknown_name_ends_with_status_2_and_the_known_ones():
    result = invoke("config", "path", "unsloth_dpp")
    assert result.exit_code == 2
    assert "choose one of unsloth_ddp" in result.output


def test_version():
    from accelerate_unsloth import __version__

    assert invoke("--version").stdout.strip() == __version__


def test_the_launch_command_holds_script_and_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--run name", "a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as a script, not as `python -m pytest`
    assert command.command(4).endswith("unsloth_ddp.yaml train.py '--run name' 'a b'")


@pytest.mark.parametrize(
    ("visible", "environment", "shown"), [(4, {}, True), (1, {}, False), (4, {"RANK": "0"}, False)]
)
def test_the_hint_is_for_one_process_among_several_gpus(visible, environment, shown, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command.show(visible)
    assert ("accelerate launch --num_processes 4" in capsys.readouterr().out) is shown


@pytest.fixture(params=["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def kernel(request, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"/usr/lib/{request.param}", "-f", "connection.json"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)


def test_the_hint_in_a_notebook_is_its_launcher(kernel, capsys):
    command.show(2)
    assert "call accelerate.notebook_launcher(train, num_processes=2)" in capsys.readouterr().out


def test_processes_asked_for_in_a_notebook_are_those_of_its_launcher(kernel, capsys):
    with pytest.raises(SystemExit):
        command.require(2, visible_gpus=2)
    assert "call accelerate.notebook_launcher(train, num_processes=2)" in capsys.readouterr().err


# ---- Written files ----


def load(file):
    return vars(load_config_from_file(str(file)))


@pytest.mark.parametrize(
    ("flags", "bundled"),
    [
        ("--cpu", "unsloth_ddp_cpu"),
        ("--num-processes 16 --num-machines 2 --main-process-ip 127.0.0.1", "unsloth_ddp_multinode"),
        ("--num-processes 1", "unsloth_single_gpu"),
    ],
)
def test_a_written_file_says_what_the_bundled_one_says(flags, bundled, tmp_path):
    assert invoke("config", "write", str(tmp_path / "own.yaml"), *flags.split()).exit_code == 0
    unread = {"gpu_ids", "rdzv_backend", "same_network"} if bundled == "unsloth_single_gpu" else set()
    found, expected = load(tmp_path / "own.yaml"), load(configs.path(bundled))
    assert {name for name in found if found[name] != expected[name]} <= unread


def test_every_flag_reaches_accelerate_with_dashes_or_underscores(tmp_path):
    file = tmp_path / "new folder" / "own.yaml"
    flags = "--num_processes 4 --num-machines=2 --machine_rank 1 --main-process-ip 10.0.0.7 --main_process_port 29600"
    result = invoke("config", "write", str(file), *flags.split(), "--mixed-precision", "bf16", "--gpu_ids", "0,3")
    assert result.exit_code == 0, result.output
    expected = {
        "num_processes": 4,
        "num_machines": 2,
        "machine_rank": 1,
        "main_process_ip": "10.0.0.7",
        "main_process_port": 29600,
        "mixed_precision": "bf16",
        "gpu_ids": "0,3",
        "use_cpu": False,
    }
    found = load(file)
    assert {name: found[name] for name in expected} == expected
    assert f"accelerate launch --config_file '{file}' --machine_rank RANK train.py" in result.output


@pytest.mark.parametrize(
    ("flags", "processes", "kind"),
    [
        ("--cpu", 2, "MULTI_GPU"),
        ("--cpu --num-processes 1", 1, "NO"),
        ("--gpu-ids 1,4,5", 3, "MULTI_GPU"),
        ("--gpu-ids 1,4 --num-machines 2 --main-process-ip a.b", 4, "MULTI_GPU"),
    ],
)
def test_the_number_of_processes_has_a_default_where_it_is_known(flags, processes, kind, tmp_path):
    assert invoke("config", "write", str(tmp_path / "own.yaml"), *flags.split()).exit_code == 0
    found = load(tmp_path / "own.yaml")
    assert (found["num_processes"], found["distributed_type"].value) == (processes, kind)
    assert found["use_cpu"] is ("--cpu" in flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "No GPU is visible, so the number of processes is unknown"),
        ("--num-processes 3 --num-machines 2 --main-process-ip a", "is not a multiple of num_machines=2"),
        ("--num-processes 4 --num-machines 2", "num_machines=2 needs main_process_ip"),
        ("--num-processes 4 --main-process-ip a", "main_process_ip='a' is for several machines"),
        ("--num-processes 4 --machine-rank 1", "machine_rank=1 must be below num_machines=1"),
        ("--cpu --gpu-ids 0,1", "gpu_ids names GPUs, and cpu does not use them"),
        ("--num-processes 0", "'--num-processes'"),
        ("--num-processes 2 --num-machines 0", "'--num-machines'"),
        ("--num-processes 4 --main-process-port 65536", "'--main-process-port'"),
        ("--num-processes 4 --mixed-precision fp8", "'fp8' is not one of"),
    ],
)
def test_a_wrong_combination_is_rejected_and_nothing_is_written(flags, said, tmp_path):
    result = invoke("config", "write", str(tmp_path / "own.yaml"), *flags.split())
    assert result.exit_code == 2
    assert said in result.output
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_reported_at_once(tmp_path):
    flags = "--num-processes 3 --num-machines 2 --machine-rank 2"
    result = invoke("config", "write", str(tmp_path / "own.yaml"), *flags.split())
    assert len(result.output.splitlines()) == 3


def test_an_existing_file_is_only_replaced_by_force(tmp_path):
    file = tmp_path / "own.yml"
    file.write_text("mine")
    result = invoke("config", "write", str(file), "--cpu")
    assert (result.exit_code, file.read_text()) == (2, "mine")
    assert "exists already" in result.output
    assert invoke("config", "write", str(file), "--cpu", "--force").exit_code == 0
    assert load(file)["num_processes"] == 2


def test_a_name_that_accelerate_would_not_read_as_yaml_is_rejected(tmp_path):
    result = invoke("config", "write", str(tmp_path / "own.json"), "--cpu")
    assert result.exit_code == 2
    assert "must end with .yaml or .yml" in result.output


def test_a_terminal_is_asked_for_what_is_missing(tmp_path):
    ours, its = pty.openpty()
    command = [sys.executable, "-c", "from accelerate_unsloth.commands import app; app()", "config", "write"]
    process = subprocess.Popen(
        [*command, "own.yaml", "--num-machines", "2"],
        stdin=its,
        stdout=its,
        stderr=its,
        env=clean_environment(),
        cwd=tmp_path,
    )
    os.close(its)
    os.write(ours, b"4\n1\n10.0.0.7\n")
    assert process.wait(timeout=120) == 0
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    asked = ("Processes, on all machines together", "Rank of this machine, from 0 [0]", "Address of machine 0")
    assert [shown.index(question) for question in asked] == sorted(shown.index(question) for question in asked)
    found = load(tmp_path / "own.yaml")
    assert (found["num_processes"], found["machine_rank"], found["main_process_ip"]) == (4, 1, "10.0.0.7")


@pytest.mark.launch
def test_accelerate_launches_two_cpu_processes_through_a_written_file(tmp_path):
    file, script = tmp_path / "own.yaml", tmp_path / "script.py"
    flags = "--cpu --main-process-port 0 --mixed-precision bf16"
    result = invoke("config", "write", str(file), *flags.split())
    assert result.output.endswith(f"\n  CUDA_VISIBLE_DEVICES= accelerate launch --config_file {file} train.py\n")
    script.write_text(
        "import os, pathlib, sys\n"
        "names = ('RANK', 'WORLD_SIZE', 'ACCELERATE_MIXED_PRECISION')\n"
        "pathlib.Path(sys.argv[1], 'rank' + os.environ['RANK']).write_text(' '.join(os.environ[n] for n in names))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, script, tmp_path]
    finished = finish(start([str(word) for word in command]), timeout_s=120)
    assert finished.status == 0, finished.output[-3000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["0 2 bf16", "1 2 bf16"]
