"""Options in a YAML file, and back."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..plugin import UnslothPlugin
from . import checks
from .explained import ExplainedConfig


def write(config: Mapping[str, Any], path: str | Path) -> None:
    """See [`ConfigManager.save`]."""
    _refuse(checks.of_config(config), "cannot be saved")
    values = dict(config)
    if values.get("plugin") is not None:
        # Every option, so that the file means the same under any environment.
        values["plugin"] = asdict(values["plugin"])
    explained = config.explain().splitlines() if isinstance(config, ExplainedConfig) else []
    comments = "".join(f"# {line}\n" for line in ["Options of accelerate_unsloth.enable_multi_gpu()", *explained])
    Path(path).write_text(comments + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def read(path: str | Path) -> dict[str, Any]:
    """See [`ConfigManager.load`]."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not plain YAML: {error}. Write plain names and values.") from error
    found = []
    if isinstance(config, dict) and isinstance(config.get("plugin"), dict):
        found = checks.of_plugin(config["plugin"])
        config["plugin"] = None if found else UnslothPlugin(**config["plugin"])
    _refuse([*checks.of_config(config), *found], f"in {path} cannot be used")
    return config


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        raise ValueError(f"These options {what}:\n  " + "\n  ".join(problems))
