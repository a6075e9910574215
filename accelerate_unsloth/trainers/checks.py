"""Mistakes of a launch, its arguments or its data that would show only later, or never."""

import difflib

from ..engines.select import choice

# isort: split
import datasets
import numpy as np
from accelerate.utils import DistributedType
from transformers.utils import logging

from ..data.prepare import check_not_empty
from ..launch.process import check_process_count
from ..launch.topology import topology
from ..plugin import UnslothPlugin
from ..weights import placed_weights
from .adapter import LossAdapter

logger = logging.get_logger(__name__)

_TEXTS = {"text", "prompt", "completion", "chosen", "rejected"}
_OTHER_FORMS = {"messages", "conversations", "prompt", "chosen"}  # beside which a column "text" is not read
_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def checked(plugin) -> UnslothPlugin:
    """Return the options, those of the environment for `None`; raise `TypeError` for anything else."""
    if not isinstance(plugin, UnslothPlugin | None):
        raise TypeError(f"plugin has to be an UnslothPlugin, such as UnslothPlugin(report=False), not {plugin!r}.")
    return plugin or UnslothPlugin()


def check_launch(trainer) -> None:
    """Raise `ValueError` if the launch is not data parallel, accelerate misses processes, or `frozen_weights` came too late."""
    check_process_count(trainer.accelerator.num_processes)
    asked_for, placed = trainer.plugin.frozen_weights, placed_weights(trainer.model)
    if placed is not None and asked_for not in ("auto", placed.choice.mode):
        raise ValueError(
            f"frozen_weights={asked_for!r} comes too late: the weights of the model were placed when it was loaded, and are "
            f"{placed.choice.mode}. Set the environment variable ACCELERATE_UNSLOTH_FROZEN_WEIGHTS={asked_for} instead."
        )
    shards = getattr(trainer.args, "context_parallel_size", None) or 1
    if shards > 1:
        raise ValueError(
            f"context_parallel_size={shards} splits each sample over GPUs in Unsloth's own way, and accelerate_unsloth "
            "trains with plain data parallelism. Leave it out, or use unsloth and trl directly."
        )
    if trainer.accelerator.distributed_type not in _DATA_PARALLEL:
        raise ValueError(
            f"This launch uses {trainer.accelerator.distributed_type.value}, and accelerate_unsloth trains with plain "
            "data parallelism. Launch with unsloth_ddp.yaml, or use trl's own trainer."
        )


def check_metric(trainer) -> None:
    """Reject a best metric that no evaluation will log, which the Trainer finds out after the first one."""
    metric = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    # Unsloth rewrites the loss of SFT alone (unsloth 2026.10.9).
    rewritten = choice.name == "unsloth" and trainer.adapter_class is LossAdapter
    missing = rewritten and trainer.compute_metrics is None and metric in trainer.adapter_class.metrics
    if missing and trainer.args.eval_strategy != "no":
        raise ValueError(
            f"metric_for_best_model={trainer.args.metric_for_best_model!r} is not logged with Unsloth, whose loss builds no "
            "logits. Use 'eval_loss', or compute the metric in compute_metrics."
        )


def check_columns(dataset, split: str, text: str, formatting_func) -> None:
    """Raise `ValueError` if no column holds the text, or there are no rows."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        return
    check_not_empty(dataset, split)
    known = ({text}, {"prompt", "completion"}, {"messages"}, {"conversations"}, {"input_ids"}, {"image"}, {"images"})
    if formatting_func is None and not any(need <= set(columns) for need in known):
        raise ValueError(
            f"The {split} dataset has the columns {', '.join(map(repr, columns))}, and none of the forms that SFT "
            f"reads: {text!r}, 'prompt' and 'completion', 'messages', or 'input_ids'. Rename a column, set "
            "dataset_text_field, or pass formatting_func."
        )


def check_rows(dataset, split: str, formatted: bool) -> None:
    """
    Raise `ValueError` if there are no rows, or one lacks a text that trainers read, with its column and index.

    What a `formatting_func` reads (`formatted`) is its own affair.
    """
    check_not_empty(dataset, split)
    if formatted or not isinstance(dataset, datasets.Dataset) or "input_ids" in dataset.column_names:
        return
    columns = {*dataset.column_names}
    read = _TEXTS & columns if columns.isdisjoint(_OTHER_FORMS) else (_TEXTS & columns) - {"text"}
    for name in sorted(read):
        if dataset.data.column(name).null_count == 0:  # read from the bitmap of the whole table
            continue
        rows = np.flatnonzero(dataset.select_columns([name]).with_format("arrow")[:][name].is_null().to_numpy())
        if len(rows):
            raise ValueError(
                f"{len(rows)} of {len(dataset)} samples have no {name!r} (None), the first at index {rows[0]}. Leave them out: "
                f"dataset.filter(lambda row: row[{name!r}] is not None)."
            )


def check_pair_columns(given: tuple, keywords: dict) -> None:
    """Raise `ValueError` if the training data, given by keyword or by place, has no rows, or no `chosen` and `rejected`."""
    dataset = keywords.get("train_dataset", given[1] if len(given) > 1 else None)
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        return
    check_not_empty(dataset, "training")
    if not ({"chosen", "rejected"} <= {*columns} or {"chosen_ids", "rejected_ids"} <= {*columns}):
        raise ValueError(
            f"The training dataset has the columns {', '.join(map(repr, columns))}, and a pair needs 'chosen' and 'rejected', "
            "and for DPO a 'prompt' unless both begin with it. Rename the columns."
        )
    if "prompt" not in columns and (close := difflib.get_close_matches("prompt", columns, 1, cutoff=0.75)):
        raise ValueError(
            f"The training dataset has the column {close[0]!r}, which is not read, and no 'prompt'. Rename it to 'prompt', or "
            "remove it if the answers begin with their prompt."
        )


def check_answers_left(lacks_answer: np.ndarray, split: str, max_length: int | None) -> None:
    """Raise `ValueError` if truncation leaves no token of some answers, with the number of such samples and the first."""
    if lacks_answer.any():
        raise ValueError(
            f"{lacks_answer.sum()} of {len(lacks_answer)} samples of the {split} dataset, the first at index "
            f"{lacks_answer.argmax()}, have no token of an answer to learn from: the answer is empty, or the prompt fills "
            f"max_length={max_length}. Set a larger max_length, shorten these prompts, or leave these samples out."
        )


def check_left_out(given, prepared, split: str, max_length: int | None) -> None:
    """Say on rank 0 how many samples TRL's preparation has left out as too long; raise `ValueError` if none is left."""
    if not (isinstance(given, datasets.Dataset) and isinstance(prepared, datasets.Dataset)):
        return
    unpaired = {"chosen", "rejected"} <= {*given.column_names} and "label" in prepared.column_names  # by KTO
    count = len(given) * (2 if unpaired else 1)
    said = (
        f"{count - len(prepared)} of {count} samples of the dataset {split!r} are left out: the prompt, or for a reward model "
        f"an answer with its prompt, is too long for max_length={max_length}."
    )
    if not len(prepared):
        raise ValueError(f"{said} Set a larger max_length, or shorten the samples.")
    if len(prepared) < count and topology().rank == 0:
        logger.warning(said)
