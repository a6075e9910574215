"""The documentation: its Python blocks run, and what it names exists."""

import ast
import configparser
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
import typer
import yaml

from accelerate_unsloth import _PUBLIC, commands
from accelerate_unsloth.plugin import ENABLE, PREFIX, UnslothPlugin

from ..launching import ROOT, WORKERS, clean_environment, launch

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ALL = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
of_each_page = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)

# Pages that lie elsewhere, see docs/site_hooks.py.
ELSEWHERE = {"results.md", "contributing.md", "changelog.md"}

# Names of a user's files, and of files that a run writes.
USERS = {"train.py", "data.jsonl", "manifest.json", "results.json"}

MODEL = "unsloth/Llama-3.2-1B-Instruct"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def marked_blocks(page) -> list[str]:
    """The Python blocks of a page below the line `<!-- run -->`."""
    return re.findall(r"^<!-- run -->\n```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.launch
def test_the_marked_blocks_run(tiny_model, uneven_data, tmp_path):
    blocks = {page.name: marked_blocks(page) for page in PAGES}
    blocks = {
        page: [
            block.replace(MODEL, str(tiny_model)).replace("load_in_4bit=True", "load_in_4bit=False") for block in found
        ]
        for page, found in blocks.items()
        if found
    }
    assert {"quickstart.md", "unmodified_scripts.md", "custom_loops.md", "exactness.md"} <= blocks.keys()
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    (tmp_path / "data.jsonl").symlink_to(uneven_data)
    finished = launch(WORKERS / "documented.py", [tmp_path / "blocks.json", tmp_path], processes=1)
    assert finished.status == 0, finished.output[-4000:]
    for page, found in blocks.items():
        assert f"ran {len(found)} block(s) of {page}" in finished.output


@of_each_page
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", without_code(page.read_text()))
    missing = [
        link for link in links if not (page.parent / link).exists() and not (page.parent == DOCS and link in ELSEWHERE)
    ]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in ALL if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`([\w./-]+\.(?:py|md|yaml|sbatch|ipynb|json|jsonl))`", without_code(page.read_text()))
    roots = [ROOT, DOCS, ROOT / "tests", ROOT / "examples", ROOT / "accelerate_unsloth"]
    assert [name for name in named if name not in USERS and not any((root / name).exists() for root in roots)] == []


def test_the_navigation_names_every_page():
    text = re.sub(r"!!python/name:\S+", "x", (ROOT / "mkdocs.yml").read_text())
    sections = [pages for section in yaml.safe_load(text)["nav"] for pages in section.values()]
    named = [page if isinstance(page, str) else next(iter(page.values())) for pages in sections for page in pages]
    assert sorted(named) == sorted([*(page.name for page in PAGES), *ELSEWHERE])


def test_the_api_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    assert [name for name in _PUBLIC if not re.search(rf"[.`]{name}\b", text)] == []


@of_each_page
def test_commands_and_their_options_are_known(page):
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("accelerate-unsloth ")]
    for line in lines:
        command, words = typer.main.get_command(commands.app), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        context = command.context_class(command)
        command.parse_args(context, words)


@of_each_page
def test_environment_variables_are_known(page):
    known = {ENABLE, *(PREFIX + name.upper() for name in UnslothPlugin.__dataclass_fields__)}
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", page.read_text()))
    assert named - known == set()


def test_quoted_messages_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", text[text.index("## Messages of this package") :], re.MULTILINE)
    assert len(quoted) > 30
    trees = [ast.parse(file.read_text()) for file in (ROOT / "accelerate_unsloth").rglob("*.py")]
    said = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    parts = [part for message in quoted for part in message.split("...") if part.strip()]
    assert [part for part in parts if not any(part in text for text in said if isinstance(text, str))] == []


def test_required_versions_are_those_of_the_package():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = re.findall(r"`(\w+>=[^`]+)`", (DOCS / "installation.md").read_text())
    assert len(named) >= 8
    assert set(named) <= set(settings["options"]["install_requires"].split())


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="mkdocs is not installed: `make docs` installs it",
)
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**clean_environment(), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert built.returncode == 0, built.stdout
    assert (tmp_path / "site" / "index.html").exists()
