"""Everything that is wrong with the options of `enable_multi_gpu`, each with its remedy."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, fields
from typing import Any

from ..patch.options import Options
from ..plugin import UnslothPlugin

_ONLY_OVERLAPPED = (
    "gradient_as_bucket_view",
    "find_unused_parameters",
    "static_graph",
    "bucket_cap_mb",
    "broadcast_buffers",
    "comm_hook",
)


def of_config(config: Any) -> list[str]:
    """
    Problems of what would be passed as `enable_multi_gpu(**config)`.

    Args:
        config (`Mapping[str, Any]`): The options.

    Returns:
        `list[str]`: one sentence or two for each problem; empty if there is none.
    """
    if not isinstance(config, Mapping):
        return [
            f"The options are a {type(config).__name__}; give a mapping of the names that enable_multi_gpu() takes."
        ]
    found = list(_refusals(Options, config, "an option of enable_multi_gpu()"))
    plugin = config.get("plugin")
    if isinstance(plugin, UnslothPlugin):
        found += of_plugin(asdict(plugin))
        found += _contradictions(config, plugin)
    return found


def of_plugin(options: Mapping[str, Any]) -> list[str]:
    """Problems of what would be passed as `UnslothPlugin(**options)`."""
    found = _refusals(UnslothPlugin, options, "an option of UnslothPlugin")
    return list(dict.fromkeys(found))  # a bad environment variable is met by every option


def _refusals(kind: type, values: Mapping[str, Any], what: str) -> Iterator[str]:
    """What `kind` itself says to each value alone, because it stops at the first."""
    known = [field.name for field in fields(kind)]
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Leave it out; known are {', '.join(known)}."
            yield f"{name!r} is not {what}. {advice}"
            continue
        try:
            kind(**{name: value})
        except ValueError as error:
            yield str(error)


def _contradictions(config: Mapping[str, Any], plugin: UnslothPlugin) -> Iterator[str]:
    """Options that are right alone, and of which one would silently have no effect beside another."""
    asked = config.get("enable_gradient_checkpointing")
    if (asked, plugin.gradient_checkpointing) in ((True, "none"), (False, "unsloth")):
        yield (
            f"enable_gradient_checkpointing={asked} contradicts the plugin's gradient_checkpointing="
            f"{plugin.gradient_checkpointing!r}, which would hold. Leave one of them out."
        )
    unused = config.get("find_unused_parameters")
    if None not in (unused, plugin.find_unused_parameters) and unused != plugin.find_unused_parameters:
        yield (
            f"find_unused_parameters={unused} contradicts the plugin's {plugin.find_unused_parameters}, which would be "
            "passed over. Leave one of them out."
        )
    cut = _cut_that_is_kept(plugin)
    if plugin.micro_batch_tokens is not None and cut:
        yield (
            f"micro_batch_tokens={plugin.micro_batch_tokens} has no effect with {cut}, which keeps the cut of the "
            "training arguments. Leave one of them out."
        )


def _cut_that_is_kept(plugin: UnslothPlugin) -> str | None:
    """The option, if any, under which micro-batches stay as the training arguments cut them."""
    if plugin.micro_batch == "fixed":
        return "micro_batch='fixed'"
    return None


def _is_changed(plugin: UnslothPlugin, option: Field) -> bool:
    return getattr(plugin, option.name) != option.metadata["default"]
