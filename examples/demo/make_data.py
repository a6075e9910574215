"""
A small real data set: functions of this Python's own standard library, and the docstrings their authors wrote.

    python examples/demo/make_data.py [FILE]     # by default .demo/data.jsonl
"""

import argparse
import ast
import json
import random
import sysconfig
from pathlib import Path

REQUEST = "Write the docstring of this Python function.\n\n{source}"
SAMPLES = 400


def functions(file: Path):
    """Source without docstring, and first paragraph of the docstring, of each documented function of a file."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)) and len(node.body) > 1:
            node.body = node.body[1:]
            yield ast.unparse(node), docstring.split("\n\n")[0]


def main(out: Path) -> None:
    if out.exists():
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    pairs = {pair for file in sorted(library.glob("*.py")) for pair in functions(file)}
    pairs = sorted(p for p in pairs if 80 < len(p[0]) < 500 and 15 < len(p[1]) < 200)
    random.Random(0).shuffle(pairs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as lines:
        for source, docstring in pairs[:SAMPLES]:
            prompt = [{"role": "user", "content": REQUEST.format(source=source)}]
            lines.write(
                json.dumps({"prompt": prompt, "completion": [{"role": "assistant", "content": docstring}]}) + "\n"
            )
    print(f"{min(len(pairs), SAMPLES)} of {len(pairs)} documented functions of {library}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, default=Path(".demo", "data.jsonl"))
    main(parser.parse_args().file)
