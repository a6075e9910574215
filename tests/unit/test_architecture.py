"""The layers of the package, and the cost of importing it."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from ..launching import ROOT, clean_environment, launch

PACKAGE = ROOT / "accelerate_unsloth"

# Lowest first: each may import from itself and from those above it in this list.
LAYERS = [
    "patches",
    "plugin",
    "devices",
    "launch",
    "memory",
    "weights",
    "data",
    "reporting",
    "reliability",
    "reduction",
    "engines",
    "policies",
    "custom_loop",
    "trainers",
    "patch",
    "config_manager",
    "testing",
    "commands",
    "__main__",
]


def imports_of(file: Path) -> set[str]:
    """Return the layers that a file imports from, at its top or inside functions."""
    layers, package = set(), file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
            path = [part for part in base if part]
            layers |= {path[0]} if path else {alias.name for alias in node.names}
    return layers


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_file_imports_upwards(file):
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    allowed = {*LAYERS[: LAYERS.index(layer) + 1], "__version__"}
    assert imports_of(file) <= allowed


def test_every_module_has_its_layer():
    found = {
        p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(LAYERS)


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment(), cwd=ROOT
    ).stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth", "rich", "typer"]
    loaded = run(f"import sys, accelerate_unsloth; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_command_line_imports_nothing_heavy():
    heavy = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth"]
    loaded = run(f"import sys, accelerate_unsloth.commands; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_engine_comes_before_trl_transformers_and_peft():
    """Unsloth, if it is the engine, is imported first, whichever name a script imports first."""
    # A finder that finds nothing records every name when its import begins, and exits at the first of the three.
    script = """
import os, sys, torch  # torch once, before each name is tried in its own process
class Finder:
    def find_spec(self, name, *_):
        print(name, flush=True)
        if name in ("trl", "transformers", "peft"):
            os._exit(0)
sys.meta_path.insert(0, Finder())
for name in ("FastLanguageModel", "SFTConfig", "SFTTrainer", "DistributedTrainerMixin"):
    if not os.fork():
        exec(f"from accelerate_unsloth import {name}")
    os.wait()
    print("end", flush=True)
"""
    tried = [names.split() for names in run(script).split("end\n")[:-1]]
    assert len(tried) == 4
    for begun in tried:
        assert begun[-1] in ("trl", "transformers", "peft")
        assert "accelerate_unsloth.engines.select" in begun


@pytest.mark.launch
def test_every_public_name_resolves(tmp_path):
    script = tmp_path / "names.py"
    script.write_text("import accelerate_unsloth as a\nfor name in a.__all__:\n    getattr(a, name)\n")
    finished = launch(script, processes=1)
    assert finished.status == 0, finished.output[-3000:]


def test_type_checkers_see_the_public_names_where_they_are():
    from accelerate_unsloth import _PUBLIC

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == _PUBLIC


def test_no_file_is_too_long():
    lengths = sorted(len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py"))
    assert lengths[-1] <= 350
    assert lengths[len(lengths) // 2] < 130


def test_an_unknown_name_is_an_attribute_error():
    import accelerate_unsloth

    with pytest.raises(AttributeError, match="has no attribute 'FastVisionary'"):
        _ = accelerate_unsloth.FastVisionary


def test_every_package_is_installed():
    """They are named one by one, because the configuration files come from another folder."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = set(settings["options"]["packages"].split())
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py")}
    assert named == found | {"accelerate_unsloth.accelerate_configs"}


def test_every_file_that_is_no_module_is_installed():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for file in PACKAGE.rglob("*.*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            package = ".".join(file.parent.relative_to(ROOT).parts)
            assert any(file.match(pattern) for pattern in settings["options.package_data"][package].split()), file
