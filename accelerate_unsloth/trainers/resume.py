"""Where a run resumes from, and whether its place in the epoch means the same samples."""

import json
import math
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..launch.channel import channel
from ..launch.topology import topology
from ..reliability import checkpoints

logger = logging.get_logger(__name__)


def newest_checkpoint(output_dir: Path) -> str | None:
    """
    Return the newest complete checkpoint that rank 0 sees, on all ranks; `None` if there is none.

    Raises:
        FileNotFoundError: if a rank does not see it, because machines share no disk.
    """
    found = None
    if topology().is_main:
        checkpoint, passed_over = checkpoints.newest_complete(output_dir)
        for line in passed_over:
            logger.warning(line)
        found = None if checkpoint is None else str(checkpoint)
    found = channel().gather("resume", found)[0]
    seen = channel().gather("resume seen", found is None or Path(found).is_dir())
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise FileNotFoundError(
            f"Rank 0 would resume from {found}, which rank(s) {blind} cannot see. Several machines need an output_dir "
            "that all of them share to resume; put it on a shared disk, or copy the checkpoint to each machine."
        )
    if found is not None and topology().is_main:
        print(f"Resuming from {found}.")
    return found


def check_effective_batch(
    checkpoint: Path, effective_batch: int, accumulation: int, samples: int | None, drop_last: bool
) -> None:
    """
    Make sure that a step has as many samples as before, because the place in the epoch is counted in steps.

    `samples` are those of an epoch, `None` for a stream.

    Raises:
        ValueError: if they differ. For a checkpoint of the stock Trainer, which does not hold it, rank 0 warns if the steps
            per epoch differ.
    """
    saved = checkpoints.read_facts(checkpoint).get("effective_batch")
    if saved is None:
        _compare_steps_per_epoch(checkpoint, effective_batch, samples, drop_last)
    elif saved != effective_batch:
        kept, rest = divmod(saved, effective_batch // accumulation)
        keep = f"gradient_accumulation_steps={kept}"
        if rest:
            keep = "per_device_train_batch_size and gradient_accumulation_steps"
        raise ValueError(
            f"{checkpoint} was written with an effective batch of {saved} samples, and this launch has {effective_batch}: "
            f"samples would be lost or repeated. Choose {keep} so that per-device batch x accumulation x processes is as "
            "before, or set ignore_data_skip=True to begin the epoch anew."
        )


def say_if_finished(checkpoint: Path, max_steps: int) -> None:
    """Say on rank 0 that a run had ended with the checkpoint from which it was resumed."""
    step = _state_of(checkpoint).get("global_step", 0)
    if step >= max_steps and topology().is_main:
        print(
            f"{checkpoint} is the end of its run (step {step} of {max_steps}), so nothing was left to train. For a new run choose "
            "another output_dir; to go on with this one, set more steps or epochs."
        )


def _state_of(checkpoint: Path) -> dict:
    file = checkpoint / TRAINER_STATE_NAME
    return json.loads(file.read_text()) if file.is_file() else {}


def _compare_steps_per_epoch(checkpoint: Path, effective_batch: int, samples: int | None, drop_last: bool) -> None:
    state = _state_of(checkpoint)
    if not state.get("epoch") or samples is None:
        return
    saved = math.ceil(round(state["global_step"] / state["epoch"], 6))  # the last step of an epoch may be smaller
    here = math.ceil(samples / effective_batch)
    if abs(saved - here) > (1 if drop_last else 0) and topology().is_main:
        logger.warning(
            f"{checkpoint} was written with {saved} steps per epoch, and this launch takes {here}, with an effective batch of "
            f"{effective_batch} samples: samples are lost or repeated in this epoch. Keep per-device batch x accumulation x "
            "processes as it was, or set ignore_data_skip=True to begin the epoch anew."
        )
