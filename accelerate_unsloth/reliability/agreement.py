"""
Cross-rank consistency checks, before training.

A rank with another learning rate, dataset or model does not fail by itself: all ranks train something that nobody asked
for, or hang. Cost: one message per rank, and one pass over the frozen weights.
"""

import hashlib
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torch.utils.data import IterableDataset

from .. import __version__
from ..data.contents import digest_of_samples
from ..data.lengths import lengths_of
from ..launch.channel import channel
from ..launch.topology import topology
from ..reporting.secrets import HIDDEN, is_secret_name, without_secrets
from ..weights import placed_weights
from .checksum import bit_sums, kept_buffers

_LIBRARIES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl", "unsloth", "unsloth_zoo")

# The text of other objects may hold an address in memory.
_PLAIN = (str, int, float, bool, list, dict, type(None))

# Arguments that may differ between ranks.
_LOCAL_ARGUMENTS = {"disable_tqdm", "local_rank", "log_level", "log_level_replica", "logging_dir", "run_name"}

# Entries of a model's configuration that depend on its folder, or are compared elsewhere.
_LOCAL_CONFIGURATION = {"_commit_hash", "_name_or_path", "auto_map", "transformers_version"}

# Longer values are compared by their digest, to keep messages readable.
_LONGEST_VALUE = 200


def describe(trainer) -> dict[str, Any]:
    """
    Return what must be the same on all ranks of a trainer, flat and JSON-serialisable.

    Secrets stay out: transformers masks its tokens in `to_dict`, those inside dictionaries are masked here, and nothing is
    read from the environment.
    """
    described = describe_setup(trainer.model, trainer.plugin)
    described |= {
        f"argument {name}": repr(_masked(value))
        for name, value in trainer.args.to_dict().items()
        if name not in _LOCAL_ARGUMENTS and isinstance(value, _PLAIN)
    }
    described |= _flat("model configuration", trainer.model.config.to_dict())
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    described |= _describe_data("training", trainer.train_dataset, columns)
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for name, rows in evaluated.items():
        described |= _describe_data(f"evaluation {name}".strip(), rows, columns)
    return described


def describe_setup(model, plugin) -> dict[str, Any]:
    """Return the part of [`describe`] that every kind of trainer has: versions, options, and trainable tensors."""
    described = {f"version of {name}": version(name) for name in _LIBRARIES}
    described["version of accelerate_unsloth"] = __version__
    described |= {f"plugin option {name}": value for name, value in asdict(plugin).items()}
    trainable = [(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters() if p.requires_grad]
    described["number of trainable tensors"] = len(trainable)
    described["names, shapes and types of trainable tensors"] = _digest(trainable)
    return described


def _flat(prefix: str, configuration: dict[str, Any]) -> dict[str, str]:
    """Return one entry for each value of a nested configuration, without those that differ between machines."""
    entries = {}
    for name, value in _masked(configuration).items():
        if isinstance(value, dict):
            entries |= _flat(f"{prefix} {name}", value)
        elif isinstance(value, _PLAIN) and name not in _LOCAL_CONFIGURATION:
            text = repr(value)
            entries[f"{prefix} {name}"] = text if len(text) <= _LONGEST_VALUE else f"digest {_digest(value)}"
    return entries


def _describe_data(split: str, rows, columns: Collection[str]) -> dict[str, Any]:
    """
    Describe a dataset with a length by the columns that training reads.

    Its fingerprint cannot be used: equal rows may have different ones, because of a function's address or another disk.
    """
    if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        return {}
    lengths = lengths_of(rows)
    return {
        f"samples of the {split} dataset": len(rows),
        f"lengths of the {split} dataset": None if lengths is None else _digest(lengths.tobytes()),
        f"contents of the {split} dataset": digest_of_samples(rows, columns),
    }


def _masked(value: Any) -> Any:
    """Return a copy of a nested value in which strings are hidden whose names are those of secrets."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(inner, str) and is_secret_name(str(name)) else _masked(inner)
            for name, inner in value.items()
        }
    return [_masked(inner) for inner in value] if isinstance(value, list) else value


def differences(descriptions: list[dict[str, Any]]) -> list[str]:
    """
    Return a line for each entry of the ranks' descriptions that is not the same on all, without what looks like a secret.

    Example:

    ```python
    >>> from accelerate_unsloth.reliability.agreement import differences
    >>> differences([{"argument seed": 1}, {"argument seed": 2}])
    ['argument seed: 1 on rank 0; 2 on rank 1']
    ```
    """
    lines = []
    for name in sorted({name for description in descriptions for name in description}):
        ranks = {}
        for rank, description in enumerate(descriptions):
            ranks.setdefault(str(description.get(name, "absent")), []).append(str(rank))
        if len(ranks) > 1:
            values = [f"{value} on rank{'s' * (len(who) > 1)} {', '.join(who)}" for value, who in ranks.items()]
            lines.append(without_secrets(f"{name}: {'; '.join(values)}"))
    return lines


def check(trainer) -> None:
    """Compare the trainers of all ranks, which call it together, by [`compare`] and [`check_frozen`]."""
    if topology().world_size > 1:
        compare(describe(trainer))
        check_frozen(trainer.model)


def check_frozen(model) -> None:
    """
    Compare the frozen weights and kept buffers of all ranks, which nothing copies from rank 0.

    What the ranks of a node share exists once there. It is compared between nodes only, by the rank that loaded it.

    Raises:
        ValueError: with the ranks that differ from rank 0, and the first tensors that differ.
    """
    if topology().world_size == 1:
        return
    placed = placed_weights(model)
    several_nodes = topology().local_world_size < topology().world_size
    shared = {id(tensor.parameter): tensor for tensor in placed.shared} if placed else {}
    summed, not_compared = kept_buffers(model), []
    for name, parameter in model.named_parameters():
        tensor = shared.get(id(parameter))
        if tensor and not (several_nodes and tensor.is_own):
            not_compared.append(name)
        elif not parameter.requires_grad:
            summed[name] = tensor.stored if tensor else parameter
    ranks_sums = channel().gather("frozen weights", [bit_sums(summed), not_compared])
    first = {name: value for sums, _ in reversed(ranks_sums) for name, value in sums.items()}
    differ = [
        {name for name in first if name not in not_summed and sums.get(name) != first[name]}
        for sums, not_summed in ranks_sums
    ]
    if any(differ):
        ranks = [str(rank) for rank, names in enumerate(differ) if names]
        names = sorted(set().union(*differ))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"Frozen weights or buffers of rank(s) {', '.join(ranks)} are not those of rank 0: {', '.join(names[:3])}{more}. "
            "Load the same model on every rank; before layers of random weights, call torch.manual_seed with one seed."
        )


def compare(description: dict[str, Any]) -> None:
    """
    Compare the descriptions of all ranks, JSON-serialisable values by name; all ranks call it together.

    Raises:
        ValueError: with each entry that differs, its ranks and values, on every rank.
    """
    lines = differences(channel().gather("settings", description))
    if lines:
        raise ValueError(
            "The ranks of this launch are set up differently:\n  "
            + "\n  ".join(lines)
            + "\nThey must be equal on all ranks. "
            "Look for code that depends on the rank, the host or the time."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
