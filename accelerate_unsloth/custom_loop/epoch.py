"""Where an epoch of a loop of one's own stands, and which loader it is of."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..data import user_loader
from ..data.contents import digest_of_samples
from ..launch.channel import channel
from ..policies.aggregation import AggregationMethod
from ..reduction import StepTotals
from ..reliability import agreement
from .state import changed


class EpochMixin:
    """The epoch, for [`MultiGPUTrainer`]."""

    def _begin(self, dataloader: DataLoader, lengths: Sequence[int] | None) -> user_loader.Epochs:
        """How the loader is dealt, which is drawn at the first step of an epoch and kept until its last."""
        epochs = self._deal(dataloader, lengths)
        if self.step_in_epoch == 0:
            self.epoch_facts, self.epoch_order = epochs.facts, self._draw(epochs.draw)
        elif self.epoch_facts != epochs.facts:
            differ = "; ".join(changed(self.epoch_facts or {}, epochs.facts))
            raise ValueError(
                f"Epoch {self.epoch} has done {self.step_in_epoch} steps of another loader: {differ}. Go on with "
                "that one, or set step_in_epoch = 0 to begin the epoch anew."
            )
        return epochs

    def _deal(self, dataloader: DataLoader, lengths: Sequence[int] | None) -> user_loader.Epochs:
        """The dealing of a loader, that of the last call where nothing that it follows from has changed."""
        rows, accumulation = getattr(dataloader, "dataset", None), self.gradient_accumulation_steps
        size = len(rows) if hasattr(rows, "__len__") else None
        if self._dealing is not None:
            (known, its_lengths), follows_from, epochs = self._dealing
            if known is dataloader and its_lengths is lengths and follows_from == (size, accumulation, self.seed):
                return epochs
        epochs = user_loader.for_training(
            dataloader, self.place, accumulation, self.seed, self.plugin.balance_tokens, lengths
        )
        described = {f"{name} of the loader": value for name, value in epochs.facts.items()}
        if self.place.world_size > 1 and size is not None:
            described["64 samples of the loader"] = digest_of_samples(rows)
        agreement.compare(described)
        self._dealing = ((dataloader, lengths), (size, accumulation, self.seed), epochs)
        return epochs

    def _draw(self, draw: Callable[[], Any]) -> Any:
        """What rank 0 draws, on every rank: through the process group, because an order grows with the data."""
        drawn = channel().run_on_main("order", draw)  # an error of the sampler ends all ranks
        return broadcast_object_list([drawn])[0]

    def _share(self, totals: StepTotals) -> float:
        """What a step weighs in the loss of its epoch: nothing if it was skipped, or had no loss."""
        if totals.nonfinite_ranks or not totals.items:
            return 0.0
        return float(totals.items) if self.aggregation.method is AggregationMethod.TOKEN_MEAN else 1.0

    def _is_over(self, epochs: user_loader.Epochs, stream: Iterator) -> bool:
        """Whether the last step was the epoch's too; a stream has to be read on to know."""
        num_steps = epochs.num_steps(self.epoch_order)
        if num_steps is not None:
            return self.step_in_epoch == num_steps
        return not any(channel().gather("samples left", next(stream, None) is not None))

    def _close_epoch(self) -> None:
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
