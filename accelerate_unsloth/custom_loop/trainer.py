"""
A trainer for loops of one's own: `Accelerator` with our dealing of samples and our one reduction a step.

The model, its loss and the data loader are the user's. Everything an optimizer step needs from other ranks is in the one
reduction behind its last backward, so ranks may have any number of micro-batches, or none.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engines.select import choice  # noqa: F401  # takes this rank's GPU, and imports Unsloth before transformers

# isort: split
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..data import user_loader
from ..data.loader import count_items
from ..launch import command
from ..launch.channel import channel
from ..launch.topology import topology, uses_cpu
from ..plugin import UnslothPlugin
from ..policies import aggregation
from ..policies.aggregation import AggregationMethod
from ..reduction import broadcast, make_reducer
from ..reliability import agreement
from ..reliability.checksum import kept_buffers
from ..reliability.grad_scaler import allow_steps_without_gradients
from ..reporting.monitor import Monitor
from . import state
from .epoch import EpochMixin
from .evaluation import EvaluationMixin
from .stats import EpochStats, RankShare
from .step import StepMixin


class MultiGPUTrainer(EpochMixin, StepMixin, EvaluationMixin):
    """
    Trains a model of one's own on every process of the launch.

    Samples are dealt over the ranks by the seed alone (by tokens where they are known), so an epoch takes the same steps
    on any number of processes with the same effective batch: batch size of the loader x accumulation x processes.

    Args:
        model ([`~torch.nn.Module`]): The model. What is trained, and the buffers it keeps, are rank 0's; frozen weights are compared.
        num_gpus (`int`, *optional*): Processes that the script wants; by default those of the launch.
        aggregation_method ([`AggregationMethod`] or `str`, *optional*):
            How the losses of a step become one; `TOKEN_MEAN` by default where tokens can be counted, else `MEAN`.
        optimizer_config (`dict`, *optional*): `{"class": torch.optim.AdamW, "kwargs": {"lr": 2e-5}}`, the default.
        scheduler_config (`dict`, *optional*):
            `{"class": torch.optim.lr_scheduler.LinearLR, "kwargs": {...}}`; moves once an optimizer step.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`): Micro-batches of a step on each rank.
        max_grad_norm (`float`, *optional*): Clips the norm of the whole gradient.
        mixed_precision (`str`, *optional*): As [`~accelerate.Accelerator`]'s; by default what the launcher says.
        loss_fn (`Callable`, *optional*): `loss_fn(model, batch)`; by default `model(**batch).loss`.
        count_items (`Callable`, *optional*): `count_items(batch)`, the positions that its loss is the mean of.
        callbacks (`Sequence[Callable]`, *optional*):
            Called as `callback(logs, step)` on rank 0 after each optimizer step, as `Accelerator.log` is.
        seed (`int`, *optional*, defaults to `42`): Of the order of samples, where the loader shuffles.
        plugin ([`UnslothPlugin`], *optional*): Options; by default those of the environment.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): After `setup`.
        aggregation (`AggregationChoice`): The method, with its reason.
        epoch (`int`), step_in_epoch (`int`), global_step (`int`): What is done.

    Raises:
        ValueError: for options that do not go together, a launch of another size, or ranks that were set up differently.

    Example:

    ```python
    >>> import torch
    >>> from accelerate_unsloth import MultiGPUTrainer
    >>> model = torch.nn.Linear(2, 1)
    >>> def loss_fn(model, batch):
    ...     return model(batch).square().mean()
    >>> trainer = MultiGPUTrainer(model, loss_fn=loss_fn)
    >>> stats = trainer.train_epoch(torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4))
    >>> stats.num_steps, stats.num_samples
    (2, 8)
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        num_gpus: int | None = None,
        aggregation_method: AggregationMethod | str | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        mixed_precision: str | None = None,
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
        count_items: Callable[[Any], int] | None = None,
        callbacks: Sequence[Callable[[dict, int], Any]] = (),
        seed: int = 42,
        plugin: UnslothPlugin | None = None,
    ):
        command.require(num_gpus, 0 if uses_cpu() else torch.cuda.device_count())
        self.plugin = plugin if plugin is not None else UnslothPlugin()
        if not isinstance(gradient_accumulation_steps, int) or gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps={gradient_accumulation_steps!r} is not a whole number from 1 on."
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} is no norm above 0. Leave it out to clip nothing.")
        self.model = model
        self.optimizer_config = _config("optimizer_config", optimizer_config, torch.optim.AdamW, {"lr": 2e-5})
        self.scheduler_config = _config("scheduler_config", scheduler_config, None, {})
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.max_grad_norm, self.mixed_precision = max_grad_norm, mixed_precision
        self.callbacks, self.seed = list(callbacks), seed
        next_token = _predicts_next_token(model)
        self._loss_fn = loss_fn or _loss_of_model
        self._count_items = count_items or _items_of(next_token and loss_fn is None)
        counts_tokens = count_items is not None or (next_token and loss_fn is None)
        self.aggregation = aggregation.resolve(aggregation_method, counts_tokens)
        self.accelerator = None
        self.epoch = self.step_in_epoch = self.global_step = 0
        self.num_tokens = 0
        # Of the epoch that is under way: what it was begun with, and the order where a sampler of one's own drew it.
        self.epoch_facts, self.epoch_order = None, None
        self._dealing, self._given = None, []

    # ---- Setting up ----

    def setup(self) -> None:
        """Place the model, make the optimizer, and compare the ranks. `train_epoch` does it if it was not called."""
        if self.accelerator is not None:
            return
        accelerator = Accelerator(
            # Not told so, accelerate takes several processes on a machine without GPUs for one each.
            cpu=uses_cpu() or not torch.cuda.is_available(),
            mixed_precision=self.mixed_precision,
            kwargs_handlers=self.plugin.kwargs_handlers(),
        )
        if accelerator.num_processes != topology().world_size:
            raise ValueError(
                f"The launcher started {topology().world_size} processes, but accelerate knows of "
                f"{accelerator.num_processes}: something built its state too early. Make no PartialState() or "
                "Accelerator() before MultiGPUTrainer.setup()."
            )
        # Device and mixed precision as always, but no DDP around the model.
        self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._reducer = make_reducer(self.trainable, accelerator.num_processes)
        self._reducer.broadcast_parameters()
        self._share_buffers()
        made = self.optimizer_config["class"](self.trainable, **self.optimizer_config["kwargs"])
        self.optimizer, self.scheduler = accelerator.prepare_optimizer(made), None
        if self.scheduler_config["class"] is not None:
            # Not accelerate's own wrapper, which moves on by the number of processes with each step.
            self.scheduler = self.scheduler_config["class"](made, **self.scheduler_config["kwargs"])
        if accelerator.scaler is not None:
            allow_steps_without_gradients(accelerator.scaler)
        self._monitor = Monitor(accelerator.device)
        self.accelerator = accelerator
        agreement.compare(self._described())
        agreement.check_frozen(self.model)

    def _share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0 that a model keeps, such as the running means of each rank's own samples."""
        if self.place.world_size > 1:
            broadcast(kept_buffers(self.model).values())

    @cached_property
    def place(self) -> user_loader.Place:
        """This rank among the others."""
        return user_loader.Place(topology().rank, topology().world_size)

    def _described(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        described = agreement.describe_setup(self.model, self.plugin)
        for name, config in (("optimizer", self.optimizer_config), ("scheduler", self.scheduler_config)):
            described[f"class of the {name}"] = str(config["class"])
            described |= {f"{key} of the {name}": _text(value) for key, value in config["kwargs"].items()}
        return described | {
            "aggregation_method": self.aggregation.method.value,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
        }

    # ---- Training ----

    def train_epoch(
        self, dataloader: DataLoader, max_steps: int | None = None, lengths: Sequence[int] | None = None
    ) -> EpochStats:
        """
        Train on every sample of a loader once, from where the epoch stands.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]):
                Of the whole data set, the same on every rank. Its batch size is that of one micro-batch on one rank. A
                shuffle is that of `seed`, whatever generator the loader has. A sampler of one's own draws once for all
                ranks, on rank 0, and its batches are taken by turns, as those of a stream are.
            max_steps (`int`, *optional*): Stop after so many optimizer steps; the next call goes on there.
            lengths (`Sequence[int]`, *optional*): Tokens of each sample; by default those of a column `input_ids`.

        Returns:
            [`EpochStats`]: of the steps of this call.

        Raises:
            FloatingPointError: if a loss or gradient is not finite on some rank, unless `on_nonfinite="skip"`.
            ValueError: for a loader that is dealt already, that differs between ranks, or that is not the one that the
                epoch was begun with.
        """
        self.setup()
        self.model.train()
        began_s, first_step, first_token = time.perf_counter(), self.global_step, self.num_tokens
        loss, weight, samples = 0.0, 0.0, 0
        agreement.compare({"max_steps": max_steps, "epoch": self.epoch, "step of the epoch": self.step_in_epoch})
        epochs = self._begin(dataloader, lengths)
        stream = epochs.steps(self.epoch, self.step_in_epoch, self.epoch_order)
        while max_steps is None or self.global_step - first_step < max_steps:
            self._monitor.begin_step()
            batches = next(stream, None)
            totals = self._step(batches)
            if totals is None:  # no rank has any data left
                self._close_epoch()
                break
            samples += sum(len(batch.samples) for batch in batches or ())
            share = self._share(totals)
            loss, weight = loss + (float(totals.loss) * share if share else 0.0), weight + share
        else:
            if self._is_over(epochs, stream):
                self._close_epoch()
        self._share_buffers()
        ranks = self._shares(samples)
        return EpochStats(
            loss=loss / weight if weight else float("nan"),
            num_tokens=self.num_tokens - first_token,
            num_samples=sum(rank.num_samples for rank in ranks),
            num_steps=self.global_step - first_step,
            elapsed_s=time.perf_counter() - began_s,
            ranks=ranks,
        )

    def _shares(self, samples: int) -> tuple[RankShare, ...]:
        """What each rank did since the last call."""
        counts = channel().gather("samples of the epoch", samples)
        readings = self._monitor.read(self.global_step)
        return tuple(
            RankShare(reading.tokens, count, reading.own_s) for reading, count in zip(readings, counts, strict=True)
        )

    # ---- Checkpoints ----

    def save_checkpoint(self, folder: str | Path) -> Path:
        """
        Write what is trained, the optimizer, the schedule and where the epoch stands: complete, or not at all.

        Args:
            folder (`str` or `Path`): The checkpoint; one that is there is replaced.
        """
        self.setup()
        return state.save(self, Path(folder))

    def load_checkpoint(self, folder: str | Path) -> None:
        """
        Go on from a checkpoint, on any number of processes with the same effective batch.

        Args:
            folder (`str` or `Path`): What [`MultiGPUTrainer.save_checkpoint`] wrote.

        Raises:
            ValueError: if it is damaged, or of another training.
        """
        self.setup()
        state.load(self, Path(folder))


def _config(name: str, given: Mapping[str, Any] | None, default, kwargs: dict) -> dict[str, Any]:
    if given is None:
        return {"class": default, "kwargs": kwargs}
    if not isinstance(given, Mapping) or not callable(given.get("class")) or set(given) - {"class", "kwargs"}:
        raise ValueError(f'{name}={given!r} is not known; give {{"class": a class, "kwargs": its arguments}}.')
    return {"class": given["class"], "kwargs": dict(given.get("kwargs", {}))}


def _text(value: Any) -> str:
    """Of a function only what it is called: its own text holds an address in memory."""
    return getattr(value, "__qualname__", None) or repr(value)


def _predicts_next_token(model: torch.nn.Module) -> bool:
    """Whether the model's own loss is transformers' for causal language models, which shifts its labels."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return getattr(model, "loss_type", None) == "ForCausalLM"


def _items_of(shifted: bool) -> Callable[[Any], int]:
    def count(batch: Any) -> int:
        return count_items(batch, shifted) if isinstance(batch, Mapping) else len(batch)

    return count


def _loss_of_model(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch is a {type(batch).__name__}, and model(**batch) needs a dict. Pass loss_fn=, a function of model and batch."
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"The model gave no loss for a batch of {', '.join(batch)}. Add labels, or pass loss_fn=.")
    return loss
