"""An epoch of a custom training loop: how its loader is split, what was drawn for it, and its statistics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..data import user_loader
from ..data.contents import digest_of_samples
from ..launch.channel import channel
from ..launch.topology import topology
from ..reliability import agreement
from ..reporting.readings import imbalance
from .checkpoint import changed


@dataclass(frozen=True)
class RankShare:
    """
    What one rank did in an epoch.

    Args:
        num_tokens (`int`): Tokens of its micro-batches, without padding where a mask marks it.
        num_samples (`int`): Samples of its micro-batches.
        work_s (`float`): Seconds of its own forwards and backwards.
    """

    num_tokens: int
    num_samples: int
    work_s: float


@dataclass(frozen=True)
class EpochStats:
    """
    Statistics of an epoch, the same on every rank.

    Args:
        loss (`float`): Mean over the tokens of all steps for `TOKEN_MEAN`, else over steps.
        num_tokens (`int`): Tokens of all ranks.
        num_samples (`int`): Samples of all ranks.
        num_steps (`int`): Optimizer steps.
        elapsed_s (`float`): Seconds, data loading included.
        ranks (`tuple[RankShare]`): Share of each rank.
    """

    loss: float
    num_tokens: int
    num_samples: int
    num_steps: int
    elapsed_s: float
    ranks: tuple[RankShare, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second, data loading included."""
        return self.num_tokens / self.elapsed_s

    @property
    def token_imbalance(self) -> float:
        """Tokens of the rank with the most, divided by the mean of all ranks."""
        return imbalance([rank.num_tokens for rank in self.ranks])


def begin(trainer, loader: DataLoader, lengths: Sequence[int] | None) -> user_loader.Epochs:
    """
    Split a loader over the ranks, which call it together. Its order is drawn at the first step of an epoch and kept to the last.

    Raises:
        ValueError: for a loader that cannot be split, differs between ranks, or is not the one of the epoch so far.
    """
    epochs = _plan(trainer, loader, lengths)
    if trainer.step_in_epoch == 0:
        trainer.epoch_facts, trainer.epoch_order = epochs.facts, draw_on_rank_0(epochs.draw)
    elif trainer.epoch_facts != epochs.facts:
        differ = "; ".join(changed(trainer.epoch_facts or {}, epochs.facts))
        raise ValueError(
            f"Epoch {trainer.epoch} has done {trainer.step_in_epoch} steps of another loader: {differ}. Continue with that "
            "loader, or set step_in_epoch = 0 to start the epoch again."
        )
    return epochs


def _plan(trainer, loader: DataLoader, lengths: Sequence[int] | None) -> user_loader.Epochs:
    """Return the epochs of a loader: the last ones, with their workers, where nothing that they depend on has changed."""
    rows = getattr(loader, "dataset", None)
    size = len(rows) if hasattr(rows, "__len__") else None
    numbers = (size, trainer.gradient_accumulation_steps, trainer.seed)
    if trainer.planned is not None:
        planned_loader, planned_lengths, planned_numbers, epochs = trainer.planned
        if planned_loader is loader and planned_lengths is lengths and planned_numbers == numbers:
            return epochs
    epochs = user_loader.for_training(
        loader, topology(), trainer.gradient_accumulation_steps, trainer.seed, trainer.plugin.balance_tokens, lengths
    )
    described = {f"{name} of the loader": value for name, value in epochs.facts.items()}
    if topology().world_size > 1 and size is not None:
        described["64 samples of the loader"] = digest_of_samples(rows)
    agreement.compare(described)
    trainer.planned = loader, lengths, numbers, epochs
    return epochs


def draw_on_rank_0(draw: Callable[[], Any]) -> Any:
    """Return what rank 0 draws, on every rank: through the process group, because an order grows with the data."""
    drawn = channel().run_on_main("order", draw)  # an error of the sampler ends all ranks
    return broadcast_object_list([drawn])[0]


def is_over(trainer, epochs: user_loader.Epochs, stream: Iterator) -> bool:
    """Return whether no rank has a step left; a stream has to be read further to know."""
    num_steps = epochs.num_steps(trainer.epoch_order)
    if num_steps is not None:
        return trainer.step_in_epoch == num_steps
    return not any(channel().gather("samples left", next(stream, None) is not None))
