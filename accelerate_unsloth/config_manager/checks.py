"""Everything that is wrong with options of `enable_multi_gpu`, each with its fix."""

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

from ..patch import enable_multi_gpu, find_problems
from ..plugin import UnslothPlugin


def of_config(config: Any) -> list[str]:
    if not isinstance(config, Mapping):
        return [f"The options are a {type(config).__name__}; give a mapping of the options of enable_multi_gpu()."]
    problems = _unknown_names(config, inspect.signature(enable_multi_gpu).parameters, "enable_multi_gpu()")
    problems += find_problems(config)
    plugin = config.get("plugin")
    return problems + (of_plugin(asdict(plugin)) if isinstance(plugin, UnslothPlugin) else [])


def of_plugin(options: Mapping[str, Any]) -> list[str]:
    known = [field.name for field in fields(UnslothPlugin)]
    problems = _unknown_names(options, known, "UnslothPlugin")
    for name in options:  # one by one, because UnslothPlugin stops at the first problem
        problems += _rejection(name, options[name]) if name in known else []
    if options.get("micro_batch") == "fixed" and options.get("micro_batch_tokens") is not None:
        problems.append(
            f"micro_batch_tokens={options['micro_batch_tokens']} has no effect with micro_batch='fixed', which keeps the "
            "micro-batches of the training arguments. Leave one of them out."
        )
    return list(dict.fromkeys(problems))  # a wrong environment variable is a problem of every option


def _rejection(name: str, value: Any) -> list[str]:
    try:
        UnslothPlugin(**{name: value})
    except ValueError as error:
        return [str(error)]
    return []


def _unknown_names(options: Mapping[str, Any], known: Collection[str], owner: str) -> list[str]:
    problems = []
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Leave it out; known are {', '.join(known)}."
            problems.append(f"{name!r} is not an option of {owner}. {advice}")
    return problems
