"""
What mkdocs is told of this repository: pages that lie outside of docs/, links to files of the checkout, docstrings.

Pages link to files as they lie in the checkout, so that links also work where the checkout is read. In the built site they
lead to the page that is made of the file, or to a copy of it.
"""

import re
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"results.md": "benchmarks/RESULTS.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
INSTEAD = {source: page for page, source in PAGES.items()} | {"README.md": "index.md"}

_LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
_REFERENCE = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\]")
_RETURNED = re.compile(r"(Returns:\n +)`([^`]+)`:")
_SEVERAL = re.compile(r"^( +)(\w+ \([^)]*\)(?:, \w+ \([^)]*\))+):(.*(?:\n\1 +.*)*)", re.MULTILINE)
_TYPE = re.compile(r"^( +\w+) \((`.*)\):", re.MULTILINE)


def on_files(files, config):
    """Add the pages that lie elsewhere."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to files outside of docs/ lead to a page or to a copy."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(link):
        target = ((ROOT / source).parent / link["path"]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        name = target.relative_to(ROOT).as_posix()
        uri = INSTEAD.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"files/{name}")
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return f"]({uri}{link['anchor'] or ''})"

    return _LINK.sub(rewrite, markdown)


class Docstrings(Extension):
    """Reads the docstrings of this package, which are written in the manner of transformers, as Google's."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        text = _REFERENCE.sub(r"`\1`", obj.docstring.value)
        text = _RETURNED.sub(r"\1\2:", text).replace("Args:\n    {options}\n", "")
        text = _SEVERAL.sub(_one_entry_each, text)
        obj.docstring.value = _TYPE.sub(lambda line: f"{line[1]} ({_plain_type(line[2])}):", text)


def _plain_type(words: str) -> str:
    """Return a type without markup; the signature shows what is optional."""
    return words.split(", *optional*")[0].replace("`", "")


def _one_entry_each(found: re.Match) -> str:
    """Return an entry for each of several arguments that share a description."""
    indent, names, description = found.groups()
    return "\n".join(f"{indent}{name}:{description}" for name in re.split(r"(?<=\)), ", names))
