"""Options in a YAML file, and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields
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
        values["plugin"] = asdict(
            values["plugin"]
        )  # every option, so that the file means the same under any environment
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
        config["plugin"] = None if found else _plugin(config["plugin"])
    _refuse([*checks.of_config(config), *found], f"in {path} cannot be used")
    return config


def _plugin(options: Mapping[str, Any]) -> UnslothPlugin:
    """What the file leaves out is the environment's; where it says null, and an option can be that, it is not."""
    plugin = UnslothPlugin(**options)
    for option in fields(plugin):
        if option.metadata["default"] is None and options.get(option.name, "") is None:
            setattr(plugin, option.name, None)
    return plugin


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        raise ValueError(f"These options {what}:\n  " + "\n  ".join(problems))
