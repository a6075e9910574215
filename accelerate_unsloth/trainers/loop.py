"""
A trainer for loops of one's own: `Accelerator` with our dealing of samples and our one reduction a step.

The model, its loss and the data loader are the user's. Everything an optimizer step needs from other ranks is in the one
reduction behind its last backward, so ranks may have any number of micro-batches, or none.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..engines.loaded import choice  # noqa: F401  # takes this rank's GPU, and imports Unsloth before transformers

# isort: split
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader

from .. import agreement, launch_hint
from ..channel import channel
from ..data import dealt
from ..data.loader import PlannedDataLoader, count_items, count_tokens
from ..monitor import Monitor
from ..plugin import UnslothPlugin
from ..policies import aggregation
from ..policies.aggregation import AggregationMethod
from ..reduction import FlatReducer, LocalReducer, StepTotals
from ..topology import topology, uses_cpu
from . import loop_state


@dataclass(frozen=True)
class RankShare:
    """
    What one rank did in an epoch.

    Args:
        num_tokens (`int`): Tokens of its micro-batches, padding left out where a mask tells it.
        num_samples (`int`): Samples of them.
        work_s (`float`): Seconds of its own forwards and backwards.
    """

    num_tokens: int
    num_samples: int
    work_s: float


@dataclass(frozen=True)
class EpochStats:
    """
    What an epoch came to, the same on every rank.

    Args:
        loss (`float`): Of all steps: their mean over tokens for `TOKEN_MEAN`, else over steps.
        num_tokens (`int`): Tokens of all ranks.
        num_samples (`int`): Samples of all ranks.
        num_steps (`int`): Optimizer steps.
        elapsed_s (`float`): Seconds, data loading included.
        ranks (`tuple[RankShare]`): The share of each rank.
    """

    loss: float
    num_tokens: int
    num_samples: int
    num_steps: int
    elapsed_s: float
    ranks: tuple[RankShare, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.elapsed_s

    @property
    def token_imbalance(self) -> float:
        """Tokens of the rank with the most over the mean."""
        most = max(rank.num_tokens for rank in self.ranks)
        return most * len(self.ranks) / max(1, self.num_tokens)


class MultiGPUTrainer:
    """
    Trains a model of one's own on every process of the launch.

    Samples are dealt over the ranks by the seed alone (by tokens where they are known), so an epoch takes the same steps
    on any number of processes with the same effective batch: batch size of the loader x accumulation x processes.

    Args:
        model ([`~torch.nn.Module`]): The model, with the same weights on every rank or not: rank 0's are taken.
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
        launch_hint.require(num_gpus, 0 if uses_cpu() else torch.cuda.device_count())
        self.plugin = plugin if plugin is not None else UnslothPlugin()
        if self.plugin.gradient_sync == "overlapped":
            raise ValueError(
                "gradient_sync='overlapped' is DistributedDataParallel's, and MultiGPUTrainer reduces after the backward. "
                "Leave it at 'auto', or write the loop with Accelerator(kwargs_handlers=plugin.kwargs_handlers())."
            )
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
        self._planned, self._given = {}, []

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
        reducer = FlatReducer if accelerator.num_processes > 1 else LocalReducer
        self._reducer = reducer(self.trainable)
        self._reducer.broadcast_parameters()
        made = self.optimizer_config["class"](self.trainable, **self.optimizer_config["kwargs"])
        self.optimizer, self.scheduler = accelerator.prepare_optimizer(made), None
        if self.scheduler_config["class"] is not None:
            # Not accelerate's own wrapper, which moves on by the number of processes with each step.
            self.scheduler = self.scheduler_config["class"](made, **self.scheduler_config["kwargs"])
        self._monitor = Monitor(accelerator.device)
        self.accelerator = accelerator
        agreement.compare(self._described())

    @cached_property
    def place(self) -> dealt.Place:
        """This rank among the others."""
        return dealt.Place(topology().rank, topology().world_size)

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
                Of the whole data set, not of a rank's part, the same on every rank. Its batch size is that of one
                micro-batch on one rank. Batches that a sampler of one's own or a stream forms are taken by turns.
            max_steps (`int`, *optional*): Stop after so many optimizer steps; the next call goes on there.
            lengths (`Sequence[int]`, *optional*): Tokens of each sample; by default those of a column `input_ids`.

        Returns:
            [`EpochStats`]: of the steps of this call.

        Raises:
            FloatingPointError: if a loss or gradient is not finite on some rank, unless `on_nonfinite="skip"`.
        """
        self.setup()
        self.model.train()
        began_s, loss, weight = time.perf_counter(), 0.0, 0.0
        tokens, samples, steps, finished = 0, 0, 0, True
        stream = self._steps(dataloader, lengths)
        while True:
            if steps == max_steps:
                finished = False
                break
            self._monitor.begin_step()
            batches = next(stream, None)
            totals = self._step(batches)
            if totals is None:  # no rank has any data left
                break
            steps += 1
            tokens += int(totals.tokens)
            samples += sum(len(batch.samples) for batch in batches or ())
            share = float(totals.items) if self.aggregation.method is AggregationMethod.TOKEN_MEAN else 1.0
            loss, weight = loss + float(totals.loss) * share, weight + share
        if finished:
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        ranks = self._shares(samples)
        return EpochStats(
            loss=loss / weight if weight else float("nan"),
            num_tokens=tokens,
            num_samples=sum(rank.num_samples for rank in ranks),
            num_steps=steps,
            elapsed_s=time.perf_counter() - began_s,
            ranks=ranks,
        )

    def _steps(self, dataloader: DataLoader, lengths: Sequence[int] | None):
        """The micro-batches of this rank in each optimizer step that is left of the epoch."""
        accumulation = self.gradient_accumulation_steps
        planned = self._planned_loader(dataloader, lengths)
        if planned is None:
            stream = dealt.by_turns(dataloader, self.place)
            for _ in islice(stream, self.step_in_epoch * accumulation):
                continue
            while batches := list(islice(stream, accumulation)):
                yield batches
            return
        planned.batch_sampler.first_step = self.step_in_epoch
        planned.set_epoch(self.epoch)
        stream = iter(planned)
        while slots := list(islice(stream, accumulation)):
            yield dealt.micro_batches(slots)

    def _planned_loader(self, dataloader: DataLoader, lengths: Sequence[int] | None) -> PlannedDataLoader | None:
        """Made once for each loader, which is kept so that no other takes its id."""
        if id(dataloader) not in self._planned:
            planned = dealt.for_training(
                dataloader,
                self.place,
                self.gradient_accumulation_steps,
                self.seed,
                self.plugin.balance_tokens,
                lengths,
            )
            self._planned[id(dataloader)] = (dataloader, planned)
        return self._planned[id(dataloader)][1]

    def _step(self, batches: list[dealt.DealtBatch] | None) -> StepTotals | None:
        """One optimizer step of all ranks; `None` if none of them has anything left."""
        work, method = batches or [], self.aggregation.method
        items = [self._count_items(batch.inputs) for batch in work]
        tokens = sum(count_tokens(b.inputs) for b in work if isinstance(b.inputs, Mapping))
        device = self.accelerator.device
        own_loss = torch.zeros((), device=device, dtype=torch.float64)
        self._monitor.begin_work()
        for batch, count, weight in zip(work, items, aggregation.weights(method, items), strict=True):
            if count:
                own_loss += self._learn(batch.inputs, weight)
        worked = self._monitor.end_work(tokens)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(own_loss)  # one that has scaled nothing cannot take part in the step
        totals = self._reducer.reduce(
            own_loss,
            torch.tensor(aggregation.rank_weight(method, items), device=device, dtype=torch.float64),
            torch.tensor(tokens, device=device, dtype=torch.float64),
            wants_stop=batches is None,
            check_gradients=self.accelerator.scaler is None,
        )
        self._monitor.add_work(worked)
        if totals.stop_votes == self.place.world_size:
            self.optimizer.zero_grad()
            return None
        if method is AggregationMethod.SUM:
            totals = self._as_sum(totals)
        self._finish_step(totals, [sample for batch in work for sample in batch.samples])
        return totals

    def _learn(self, inputs: Any, weight: float) -> torch.Tensor:
        """Forward and backward of one micro-batch; what it adds to this rank's loss."""
        loss = self._loss_fn(self.model, send_to_device(inputs, self.accelerator.device, non_blocking=True)) * weight
        self.accelerator.backward(loss)
        return loss.detach()

    def _as_sum(self, totals: StepTotals) -> StepTotals:
        """The sum that a mean over ranks was made from."""
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, float(totals.items))
        return StepTotals(**{**vars(totals), "loss": totals.loss * totals.items})

    def _finish_step(self, totals: StepTotals, samples: list) -> None:
        self.step_in_epoch += 1
        self.global_step += 1
        self.num_tokens += int(totals.tokens)
        logs = {"loss": float(totals.loss), "epoch": self.epoch, "num_tokens": self.num_tokens}
        logs["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if totals.nonfinite_ranks:
            self._handle_nonfinite(totals.nonfinite_ranks, samples)
        elif self.max_grad_norm is not None:
            logs["grad_norm"] = float(self.accelerator.clip_grad_norm_(self.trainable, self.max_grad_norm))
        self.optimizer.step()
        if self.scheduler is not None and not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback(dict(logs), self.global_step)

    def _handle_nonfinite(self, ranks: list[int], samples: list) -> None:
        found = channel().gather("samples", samples)
        where = "; ".join(f"rank {rank} (samples {found[rank]})" for rank in ranks)
        message = f"The loss or a gradient of step {self.global_step} is not finite on {where}."
        if self.plugin.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{message} Look at these samples, lower the learning rate, or set on_nonfinite='skip' to pass over such steps."
            )
        if self.accelerator.is_main_process:
            print(f"{message} The step is skipped on all ranks.")
        if self.accelerator.scaler is None:  # which skips by itself, and wants to see the gradients for it
            self.optimizer.zero_grad()

    def _shares(self, samples: int) -> tuple[RankShare, ...]:
        """What each rank did since the last call."""
        counts = channel().gather("samples of the epoch", samples)
        readings = self._monitor.read(self.global_step)
        return tuple(
            RankShare(reading.tokens, count, reading.own_s) for reading, count in zip(readings, counts, strict=True)
        )

    # ---- Evaluation ----

    def batches(self, dataloader: DataLoader):
        """
        This rank's batches of a loader, on its device, each sample on one rank: for a pass of one's own.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]): Of the whole data set, the same on every rank.

        Example:

        ```python
        scores = [score for batch in trainer.batches(loader) for score in judge(model, batch)]
        scores = trainer.gather(scores)  # of the whole data set, in its order, on every rank
        ```
        """
        self.setup()
        self._given = []
        for batch in dealt.for_evaluation(dataloader, self.place, self.plugin.balance_tokens):
            self._given += batch.samples
            yield send_to_device(batch.inputs, self.accelerator.device)

    def gather(self, results: Sequence | torch.Tensor) -> list | torch.Tensor:
        """
        One result a sample, of all ranks, in the order of the data set and without repeats, on every rank.

        Args:
            results (`Sequence` or `torch.Tensor`):
                This rank's, one for each sample of the last [`MultiGPUTrainer.batches`], in that order.

        Returns:
            `list`, or `torch.Tensor` of shape `(samples, ...)` on the CPU if tensors were given.

        Raises:
            ValueError: if there are more or fewer results than samples.
        """
        if len(results) != len(self._given):
            raise ValueError(
                f"gather() got {len(results)} results, but the last pass gave rank {self.place.rank} {len(self._given)} "
                "samples. Pass one result for each, in the order of batches()."
            )
        own = [result.detach().cpu() if isinstance(result, torch.Tensor) else result for result in results]
        everyone = gather_object(list(zip(self._given, own, strict=True)))
        ordered = [result for _, result in sorted(everyone, key=lambda pair: pair[0])]
        return torch.stack(ordered) if ordered and isinstance(ordered[0], torch.Tensor) else ordered

    @torch.no_grad()
    def evaluate(self, dataloader: DataLoader) -> dict[str, float]:
        """
        The mean loss over a loader: over all its tokens for `TOKEN_MEAN`, else over its samples.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]): Of the whole data set, the same on every rank.

        Returns:
            `dict` with `eval_loss`, `eval_samples` and `eval_runtime` (seconds), the same on every rank.
        """
        self.setup()
        was_training, began_s = self.model.training, time.perf_counter()
        self.model.eval()
        loss, weight, samples = 0.0, 0, 0
        for batch in dealt.for_evaluation(dataloader, self.place, self.plugin.balance_tokens):
            by_tokens = self.aggregation.method is AggregationMethod.TOKEN_MEAN
            share = self._count_items(batch.inputs) if by_tokens else len(batch.samples)
            samples += len(batch.samples)
            if share:
                inputs = send_to_device(batch.inputs, self.accelerator.device)
                loss, weight = loss + float(self._loss_fn(self.model, inputs)) * share, weight + share
        self.model.train(was_training)
        losses, weights, counts = zip(*channel().gather("evaluation", [loss, weight, samples]), strict=True)
        return {
            "eval_loss": sum(losses) / max(1, sum(weights)),
            "eval_samples": sum(counts),
            "eval_runtime": time.perf_counter() - began_s,
        }

    # ---- Checkpoints ----

    def save_checkpoint(self, folder: str | Path) -> Path:
        """
        Write what is trained, the optimizer, the schedule and where the epoch stands: complete, or not at all.

        Args:
            folder (`str` or `Path`): The checkpoint; one that is there is replaced.
        """
        self.setup()
        return loop_state.save(self, Path(folder))

    def load_checkpoint(self, folder: str | Path) -> None:
        """
        Go on from a checkpoint, on any number of processes with the same effective batch.

        Args:
            folder (`str` or `Path`): What [`MultiGPUTrainer.save_checkpoint`] wrote.

        Raises:
            ValueError: if it is damaged, or of another training.
        """
        self.setup()
        loop_state.load(self, Path(folder))


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
