"""The sdist and the wheel that `python -m build` makes, and what an installation of the wheel does outside of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from ..launching import ROOT, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.launch]

NEEDED = (
    "accelerate_unsloth/py.typed",
    "accelerate_unsloth/reporting/html/report.html.j2",
    "accelerate_unsloth/accelerate_configs/unsloth_ddp.yaml",
    "accelerate_unsloth/accelerate_configs/unsloth_ddp_cpu.yaml",
    "accelerate_unsloth/accelerate_configs/unsloth_ddp_multinode.yaml",
    "accelerate_unsloth/accelerate_configs/unsloth_single_gpu.yaml",
)


def run(command, folder, timeout_s=300) -> str:
    """Run a command that knows nothing of the checkout, and return what it printed."""
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, timeout=timeout_s, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    # A build leaves folders behind, and caches of the checkout must not get into the package.
    not_source = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "unsloth_compiled_cache")
    shutil.copytree(ROOT, folder / "checkout", ignore=not_source)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, folder], folder / "checkout")
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, as `python -m build` does, with the setuptools that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder]
    run([sys.executable, "-m", "pip", "wheel", *options, sdist], folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of the commands of an environment with the wheel, and with the other packages of this environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder], ROOT.anchor)
    (site,) = folder.glob("lib/python*/site-packages")
    # An editable installation does not take part: Python reads no .pth files in folders that a .pth file names.
    others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    options = ["--no-deps", "--no-index", "--force-reinstall"]
    run([sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel], ROOT.anchor)
    return folder / "bin"


def test_the_sdist_has_what_a_wheel_is_built_from(sdist):
    top = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    sources = [name.replace("accelerate_unsloth/accelerate_configs", "accelerate_configs") for name in NEEDED]
    assert {*sources, "LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "accelerate_unsloth").rglob("*.py")}
    meta = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/", 1)[1] for name in meta} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}
    assert set(names) - meta == modules | set(NEEDED)


def test_a_configuration_is_found_in_the_installation(installed, tmp_path):
    path = run([installed / "accelerate-unsloth", "config", "path", "unsloth_ddp"], tmp_path).strip()
    assert Path(path).is_file()
    assert Path(path).is_relative_to(installed.parent)


def test_the_installation_passes_its_own_check(installed, tmp_path):
    output = run([installed / "accelerate-unsloth", "test"], tmp_path)
    assert "This installation works." in output


def test_an_example_trains_on_two_processes_with_the_installation(installed, tiny_model, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    say = "import accelerate_unsloth, os\nos.write(1, f'from {accelerate_unsloth.__file__}\\n'.encode())\n"
    example = tmp_path / "examples" / "quick_start.py"
    example.write_text(example.read_text() + say)
    config = run([installed / "accelerate-unsloth", "config", "path", "unsloth_ddp_cpu"], tmp_path).strip()
    launcher = [installed / "python", "-m", "accelerate.commands.launch", "--config_file", config]
    output = run([*launcher, "--main_process_port", 0, example, tiny_model, tmp_path / "out"], tmp_path)
    assert output.count("per device 2 x accumulation 2 x processes 2") == 1
    assert output.count(f"from {installed.parent}{os.sep}") == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
