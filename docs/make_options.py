"""Write docs/options.md from the options' metadata: `python docs/make_options.py`. The suite compares the two."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate_unsloth.plugin import PREFIX, UnslothPlugin

PAGE = Path(__file__).with_name("options.md")

HEAD = f"""# Options

Each option is an argument of `UnslothPlugin`, which trainers take as `plugin=`, and an environment variable:
`{PREFIX}` and its name in capitals. An argument wins over the variable. `MultiGPUTrainer` reads `balance_tokens`,
`on_nonfinite` and the options of `ddp_kwargs()`; memory, signals and resume are the loop's own.

This page is generated from `accelerate_unsloth/plugin.py` by `python docs/make_options.py`.

| option | values | default | effect |
|---|---|---|---|
"""


def page() -> str:
    """Return the page."""
    hints = get_type_hints(UnslothPlugin)
    return HEAD + "".join(
        f"| `{option.name}` | {_values(hints[option.name])} | `{option.metadata['default']}` | {option.metadata['help']} |\n"
        for option in fields(UnslothPlugin)
    )


def _values(hint) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    return {bool: "`True`, `False`", int: "a whole number", float: "above 0, at most 1"}[kinds[0]]


if __name__ == "__main__":
    PAGE.write_text(page())
