"""The bundled accelerate files, by Accelerate's own loader, and the command that finds them."""

import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from accelerate_unsloth import configs, launch_hint
from accelerate_unsloth.cli import app


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
    assert launch_hint.command(4).endswith("unsloth_ddp.yaml train.py '--run name' 'a b'")


@pytest.mark.parametrize(
    ("visible", "environment", "shown"), [(4, {}, True), (1, {}, False), (4, {"RANK": "0"}, False)]
)
def test_the_hint_is_for_one_process_among_several_gpus(visible, environment, shown, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch_hint.show(visible)
    assert ("accelerate launch --num_processes 4" in capsys.readouterr().out) is shown
