"""Turn a sampler's micro-batches of indices into collated tensors, and count their items and tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

IGNORED = -100


class MicroStep(list):
    """
    The micro-batches of one rank in one micro-step that the Trainer counts: none, one or several.

    Its attribute `samples` holds the indices of the samples of each, as the sampler yielded them.
    """


@dataclass
class MicroBatch:
    """One forward and backward of this rank."""

    inputs: dict
    items: int  # what its loss is a mean over: positions whose loss counts
    samples: list[int]  # indices into the training dataset; empty if they are not known or not needed


class _Rows(Dataset):
    """A dataset that also accepts a list of lists of indices, for a micro-step of several micro-batches."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]

    def __getitems__(self, indices: list) -> list:
        if not indices or isinstance(indices[0], list):
            micro_step = MicroStep(self.__getitems__(batch) for batch in indices)
            micro_step.samples = indices
            return micro_step
        if hasattr(self.rows, "__getitems__"):
            return self.rows.__getitems__(indices)
        return [self.rows[index] for index in indices]


def _collate(collator: Callable[[list], dict], rows: list) -> dict[str, Any] | MicroStep:
    """Apply the trainer's collator to each micro-batch."""
    if not isinstance(rows, MicroStep):
        return collator(rows)
    micro_step = MicroStep(collator(batch) for batch in rows)
    micro_step.samples = rows.samples
    return micro_step


class PlannedDataLoader(DataLoader):
    """A DataLoader whose `set_epoch`, which the Trainer calls, sets the epoch of its batch sampler."""

    def __init__(self, rows, batch_sampler: Sampler, collator: Callable[[list], dict], **options: Any):
        super().__init__(_Rows(rows), batch_sampler=batch_sampler, collate_fn=partial(_collate, collator), **options)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def worker_seeding(num_workers: int, rank: int) -> Callable[[int], None]:
    """
    Return a `worker_init_fn` that seeds the workers of each rank differently, as the stock Trainer does.

    If all ranks are seeded alike, they draw the same base seed, and their workers would augment with the same numbers.
    """
    from transformers.trainer_utils import seed_worker  # here, because Unsloth is imported before transformers

    return partial(seed_worker, num_workers=num_workers, rank=rank)


def count_items(batch: dict[str, Any], shifted: bool = True) -> int:
    """
    Count the positions of a collated micro-batch whose loss counts; without labels, count its rows.

    `labels` and `shift_labels` have shape `(rows, tokens)`. With `shifted` the model predicts `labels[..., 1:]`.
    """
    if "shift_labels" in batch:
        return int(batch["shift_labels"].ne(IGNORED).sum())
    if "labels" in batch:
        labels = batch["labels"][..., 1:] if shifted else batch["labels"]
        return int(labels.ne(IGNORED).sum())
    return len(next(iter(batch.values())))


def count_tokens(batch: dict[str, Any]) -> int:
    """Count the tokens of a collated micro-batch, without padding if a mask or the lengths of its rows are known."""
    if "packed_seq_lengths" in batch:
        return int(batch["packed_seq_lengths"].sum())
    if batch.get("attention_mask") is not None and batch["attention_mask"].ndim == 2:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0
