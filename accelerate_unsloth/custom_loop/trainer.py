"""
A trainer for custom training loops: an `Accelerator` with exact sample assignment and one reduction per step.

The user brings the model, its loss and the data loader. All that an optimizer step needs from other ranks is in the one
reduction after its last backward, so ranks may have any number of micro-batches, or none.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engines.select import choice  # noqa: F401  # binds this rank's GPU, and imports Unsloth before transformers

# isort: split
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader

from ..data import user_loader
from ..launch import command, process
from ..launch.channel import channel
from ..launch.topology import topology, uses_cpu
from ..plugin import UnslothPlugin, is_count
from ..policies import aggregation
from ..policies.aggregation import AggregationMethod
from ..reduction import broadcast, make_reducer
from ..reliability import agreement
from ..reliability.checksum import kept_buffers
from ..reliability.grad_scaler import allow_steps_without_gradients
from ..reporting.monitor import Monitor
from . import checkpoint, epoch, step
from .epoch import EpochStats, RankShare


class MultiGPUTrainer:
    """
    Trains a model in a custom loop on every process of the launch.

    Samples are assigned to ranks by the seed alone (by tokens where they are known). So an epoch takes the same steps on any
    number of processes with the same effective batch: batch size of the loader x accumulation x processes.

    Args:
        model ([`~torch.nn.Module`]):
            The model. Trainable weights and kept buffers are copied from rank 0; frozen weights are compared.
        num_gpus (`int`, *optional*): Number of processes that the script needs; by default those of the launch.
        aggregation_method ([`AggregationMethod`] or `str`, *optional*):
            How the losses of a step become one; by default `TOKEN_MEAN` where tokens can be counted, else `MEAN`.
        optimizer_config (`dict`, *optional*): `{"class": torch.optim.AdamW, "kwargs": {"lr": 2e-5}}`, the default.
        scheduler_config (`dict`, *optional*):
            `{"class": torch.optim.lr_scheduler.LinearLR, "kwargs": {...}}`; stepped once per optimizer step.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`): Micro-batches of a step on each rank.
        max_grad_norm (`float`, *optional*): Largest norm of the whole gradient; a larger one is clipped.
        mixed_precision (`str`, *optional*): As for [`~accelerate.Accelerator`]; by default the launcher's.
        loss_fn (`Callable`, *optional*): `loss_fn(model, batch)`; by default `model(**batch).loss`.
        count_items (`Callable`, *optional*): `count_items(batch)`, the number of positions that its loss is the mean over.
        callbacks (`Sequence[Callable]`, *optional*):
            Called as `callback(logs, step)` on rank 0 after each optimizer step; `Accelerator.log` is one.
        seed (`int`, *optional*, defaults to `42`): Seed of the order of samples, where the loader shuffles.
        plugin ([`UnslothPlugin`], *optional*): Options; by default those of the environment.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): The accelerator, after `setup`.
        aggregation (`AggregationChoice`): The method, with its reason.
        epoch (`int`), step_in_epoch (`int`), global_step (`int`): The position of the training.

    Raises:
        ValueError: for options that contradict each other, a launch of another size, or ranks that are set up differently.

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
        if not is_count(gradient_accumulation_steps):
            raise ValueError(
                f"gradient_accumulation_steps={gradient_accumulation_steps!r} is not a whole number of at least 1."
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} is not above 0. Leave it out to clip nothing.")
        self.model = model
        self.plugin = plugin if plugin is not None else UnslothPlugin()
        self.optimizer_config = _config("optimizer_config", optimizer_config, torch.optim.AdamW, {"lr": 2e-5})
        self.scheduler_config = _config("scheduler_config", scheduler_config, None, {})
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.max_grad_norm, self.mixed_precision = max_grad_norm, mixed_precision
        self.callbacks, self.seed = list(callbacks), seed
        shifts_labels = loss_fn is None and step.predicts_next_token(model)
        self.loss_fn = loss_fn or step.loss_of_model
        self.count_items = count_items or step.make_item_counter(shifts_labels)
        self.aggregation = aggregation.resolve(aggregation_method, count_items is not None or shifts_labels)
        self.accelerator = None
        self.epoch = self.step_in_epoch = self.global_step = self.num_tokens = 0
        # Of the current epoch: what its loader was like, and the order that a custom sampler drew.
        self.epoch_facts, self.epoch_order = None, None
        self.planned, self._samples_of_pass = None, []

    def setup(self) -> None:
        """Place the model, make the optimizer, and compare the ranks. All other methods call it where it was not called."""
        if self.accelerator is not None:
            return
        accelerator = Accelerator(
            # Unless told so, accelerate takes several processes on a machine without GPUs for independent ones.
            cpu=uses_cpu() or not torch.cuda.is_available(),
            mixed_precision=self.mixed_precision,
            kwargs_handlers=self.plugin.kwargs_handlers(),
        )
        process.check_process_count(accelerator.num_processes)
        # Device and mixed precision as always, but no DDP around the model.
        self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.reducer = make_reducer(self.trainable, accelerator.num_processes)
        self.reducer.broadcast_parameters()
        self._share_buffers()
        optimizer = self.optimizer_config["class"](self.trainable, **self.optimizer_config["kwargs"])
        self.optimizer, self.scheduler = accelerator.prepare_optimizer(optimizer), None
        if self.scheduler_config["class"] is not None:
            # Without accelerate's wrapper, which steps as many times as there are processes.
            self.scheduler = self.scheduler_config["class"](optimizer, **self.scheduler_config["kwargs"])
        if accelerator.scaler is not None:
            allow_steps_without_gradients(accelerator.scaler)
        self.monitor = Monitor(accelerator.device)
        self.accelerator = accelerator
        agreement.compare(self._described())
        agreement.check_frozen(self.model)

    def _share_buffers(self) -> None:
        """Give all ranks rank 0's kept buffers, such as running means, which follow each rank's own samples."""
        if topology().world_size > 1:
            broadcast(kept_buffers(self.model).values())

    def _described(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        described = agreement.describe_setup(self.model, self.plugin)
        for name, config in (("optimizer", self.optimizer_config), ("scheduler", self.scheduler_config)):
            described[f"class of the {name}"] = str(config["class"])
            for key, value in config["kwargs"].items():
                # Of a function only its name: its text holds an address in memory.
                described[f"{key} of the {name}"] = getattr(value, "__qualname__", None) or repr(value)
        described |= {name: getattr(self, name) for name in ("gradient_accumulation_steps", "max_grad_norm", "seed")}
        return described | {"aggregation_method": self.aggregation.method.value}

    def train_epoch(
        self, dataloader: DataLoader, max_steps: int | None = None, lengths: Sequence[int] | None = None
    ) -> EpochStats:
        """
        Train on every sample of a loader once, from the current position of the epoch.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]):
                The loader of the whole dataset, the same on every rank. Its batch size is that of one micro-batch on one
                rank. A shuffle uses `seed`, whatever generator the loader has. A custom sampler draws once for all ranks, on
                rank 0, and its batches are assigned round-robin, as those of a stream are.
            max_steps (`int`, *optional*): Stop after so many optimizer steps; the next call continues there.
            lengths (`Sequence[int]`, *optional*): Tokens of each sample; by default those of a column `input_ids`.

        Returns:
            [`EpochStats`]: of the steps of this call.

        Raises:
            FloatingPointError: if a loss or gradient is not finite on some rank, unless `on_nonfinite="skip"`.
            ValueError: for a loader that is already split, differs between ranks, or is not the one that the epoch was
                begun with.
        """
        self.setup()
        self.model.train()
        began_s, first_step, first_token = time.perf_counter(), self.global_step, self.num_tokens
        loss, weight, samples = 0.0, 0.0, 0
        agreement.compare({"max_steps": max_steps, "epoch": self.epoch, "step of the epoch": self.step_in_epoch})
        epochs = epoch.begin(self, dataloader, lengths)
        stream = epochs.steps(self.epoch, self.step_in_epoch, self.epoch_order)
        ended = False
        while not ended and (max_steps is None or self.global_step - first_step < max_steps):
            self.monitor.begin_step()
            batches = next(stream, None)
            totals = step.run(self, batches)
            ended = totals is None
            samples += sum(len(batch.samples) for batch in batches or ())
            if not ended and not totals.nonfinite_ranks and totals.items:  # a step that is skipped has no loss
                by_tokens = self.aggregation.method is AggregationMethod.TOKEN_MEAN
                step_weight = float(totals.items) if by_tokens else 1.0
                loss, weight = loss + float(totals.loss) * step_weight, weight + step_weight
        if ended or epoch.is_over(self, epochs, stream):
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._share_buffers()
        counts = channel().gather("samples of the epoch", samples)
        readings = self.monitor.read(self.global_step)
        return EpochStats(
            loss=loss / weight if weight else float("nan"),
            num_tokens=self.num_tokens - first_token,
            num_samples=sum(counts),
            num_steps=self.global_step - first_step,
            elapsed_s=time.perf_counter() - began_s,
            ranks=tuple(RankShare(r.tokens, count, r.own_s) for r, count in zip(readings, counts, strict=True)),
        )

    def batches(self, dataloader: DataLoader) -> Iterator[Any]:
        """
        Yield this rank's batches of a loader, on its device, each sample on one rank: for a custom evaluation.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]):
                The loader of the whole dataset, the same on every rank. What its `drop_last` would leave out is included.

        Example:

        ```python
        scores = [score for batch in trainer.batches(loader) for score in judge(model, batch)]
        scores = trainer.gather(scores)  # of the whole dataset, in its order, on every rank
        ```
        """
        self.setup()
        self._samples_of_pass = []
        for batch in self._local_batches(dataloader):
            self._samples_of_pass += batch.samples
            yield send_to_device(batch.inputs, self.accelerator.device)

    def _local_batches(self, dataloader: DataLoader) -> Iterator[user_loader.LocalBatch]:
        return user_loader.for_evaluation(dataloader, topology(), self.plugin.balance_tokens, epoch.draw_on_rank_0)

    def gather(self, results: Sequence | torch.Tensor) -> list | torch.Tensor:
        """
        Return the results of all ranks, one per sample, in the order of the dataset and without repeats, on every rank.

        Args:
            results (`Sequence` or `torch.Tensor`):
                This rank's results, one for each sample of the last [`MultiGPUTrainer.batches`], in that order.

        Returns:
            `list`, or `torch.Tensor` of shape `(samples, ...)` on the CPU if tensors were given.

        Raises:
            ValueError: if there are more or fewer results than samples.
        """
        samples = self._samples_of_pass
        if len(results) != len(samples):
            raise ValueError(
                f"gather() got {len(results)} results, but the last pass gave rank {topology().rank} {len(samples)} samples. "
                "Pass one result for each, in the order of batches()."
            )
        own = [result.detach().cpu() if isinstance(result, torch.Tensor) else result for result in results]
        everyone = gather_object(list(zip(samples, own, strict=True)))
        ordered = [result for _, result in sorted(everyone, key=lambda pair: pair[0])]
        return torch.stack(ordered) if ordered and isinstance(ordered[0], torch.Tensor) else ordered

    @torch.no_grad()
    def evaluate(self, dataloader: DataLoader) -> dict[str, float]:
        """
        Return the mean loss over a loader: over its tokens for `TOKEN_MEAN`, else over its samples; nan if nothing has a loss.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]): The loader of the whole dataset, the same on every rank.

        Returns:
            `dict` with `eval_loss`, `eval_samples` and `eval_runtime` (seconds), the same on every rank.
        """
        self.setup()
        was_training, began_s = self.model.training, time.perf_counter()
        self.model.eval()
        loss, weight, samples = 0.0, 0, 0
        for batch in self._local_batches(dataloader):
            samples += len(batch.samples)
            items = self.count_items(batch.inputs)
            if items:
                by_tokens = self.aggregation.method is AggregationMethod.TOKEN_MEAN
                batch_weight = items if by_tokens else len(batch.samples)
                inputs = send_to_device(batch.inputs, self.accelerator.device)
                loss += float(self.loss_fn(self.model, inputs)) * batch_weight
                weight += batch_weight
        self.model.train(was_training)
        losses, weights, counts = zip(*channel().gather("evaluation", [loss, weight, samples]), strict=True)
        return {
            "eval_loss": sum(losses) / sum(weights) if any(weights) else float("nan"),
            "eval_samples": sum(counts),
            "eval_runtime": time.perf_counter() - began_s,
        }

    def save_checkpoint(self, folder: str | Path) -> Path:
        """
        Write what is trained, the optimizer, the schedule and the position in the epoch: complete, or not at all.

        Args:
            folder (`str` or `Path`): Folder of the checkpoint; an older checkpoint there is replaced.
        """
        self.setup()
        return checkpoint.save(self, Path(folder))

    def load_checkpoint(self, folder: str | Path) -> None:
        """
        Continue from a checkpoint, on any number of processes with the same effective batch.

        Args:
            folder (`str` or `Path`): What [`MultiGPUTrainer.save_checkpoint`] wrote.

        Raises:
            ValueError: if the checkpoint is damaged, or from another training.
        """
        self.setup()
        checkpoint.load(self, Path(folder))


def _config(name: str, given: Mapping[str, Any] | None, default, kwargs: dict) -> dict[str, Any]:
    if given is None:
        return {"class": default, "kwargs": kwargs}
    if not isinstance(given, Mapping) or not callable(given.get("class")) or set(given) - {"class", "kwargs"}:
        raise ValueError(f'{name}={given!r} is not known; give {{"class": a class, "kwargs": its arguments}}.')
    return {"class": given["class"], "kwargs": dict(given.get("kwargs", {}))}
