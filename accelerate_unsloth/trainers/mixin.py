"""
What every trainer shares: exact steps on any number of processes, whatever Unsloth or TRL compute inside them.

The mixin sits in front of a TRL trainer, as Unsloth left it or plain, and overrides where the stock Trainer's ranks
would meet: the data loader, the token count, the training step, evaluation and saving. Private methods of the Trainer
that it relies on are listed in `tests/launch/test_patched_points.py`.
"""

import functools
import math
from itertools import islice

from ..engines.loaded import choice

# isort: split
import torch
from accelerate.utils import DistributedType

from ..data.loader import MicroBatch, Slot, count_items, count_tokens
from ..data.prepare import check_has_labels, check_not_empty, prepare_once
from ..launch.channel import channel
from ..launch.topology import topology
from ..plugin import UnslothPlugin
from ..policies import gradient_sync
from ..reduction import FlatReducer
from ..reliability import agreement, rank0_writes
from ..reliability.grad_scaler import allow_steps_without_gradients
from ..reporting import startup_table
from ..reporting.monitor import Monitor
from ..reporting.verbosity import mute_libraries, muted_prints
from . import loss
from .checkpoints import CheckpointMixin
from .evaluation import EvaluationMixin
from .guards import GuardMixin
from .losses import METRICS, LossMixin
from .out_of_memory import OutOfMemoryMixin
from .planning import PlanningMixin
from .probing import ProbeMixin
from .reporting import ReportMixin

_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class DistributedTrainerMixin(
    GuardMixin,
    ReportMixin,
    CheckpointMixin,
    EvaluationMixin,
    LossMixin,
    OutOfMemoryMixin,
    PlanningMixin,
    ProbeMixin,
):
    """
    Mixin for trainers of the kind of TRL's SFTTrainer: a loss over labelled tokens. Put it first among the bases.

    Args:
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples or labels, ranks that were set up differently, or a launch that is not
            data parallel.

    Example:

    ```python
    >>> from accelerate_unsloth import DistributedTrainerMixin
    >>> from trl import SFTTrainer
    >>> class MySFTTrainer(DistributedTrainerMixin, SFTTrainer): ...
    ```
    """

    def __init__(self, *args, plugin: UnslothPlugin | None = None, **kwargs):
        self.plugin = plugin if plugin is not None else UnslothPlugin()
        if self.plugin.engine not in ("auto", choice.name):
            raise ValueError(
                f"engine={self.plugin.engine!r} comes too late: {choice.name!r} was chosen when accelerate_unsloth was "
                f"first used. Set the environment variable ACCELERATE_UNSLOTH_ENGINE={self.plugin.engine} instead."
            )
        self._reducer = None
        self._step_items = self._step_tokens = None
        self._in_step = False
        with muted_prints():
            super().__init__(*args, **kwargs)
        if self.args.log_level_replica == "warning":  # the default, under which Unsloth's banners come from every rank
            mute_libraries()
        check_has_labels(self.train_dataset, "training")
        self._check_launch()
        self._monitor = Monitor(self.args.device)
        if self.plugin.monitor:
            self.add_callback(self._monitor)
        self._resolve_policies()
        agreement.check(self)

    def _check_launch(self) -> None:
        launched, known = topology().world_size, self.accelerator.num_processes
        if launched != known:
            raise ValueError(
                f"The launcher started {launched} processes, but accelerate knows of {known}: something built its state "
                "too early, without knowing of the CPU. Make no PartialState() or Accelerator() before the trainer's "
                "arguments, or pass cpu=True to it."
            )
        shards = getattr(self.args, "context_parallel_size", None) or 1
        if shards > 1:
            raise ValueError(
                f"context_parallel_size={shards} splits each sample over GPUs in Unsloth's own way, and accelerate_unsloth "
                "trains with plain data parallelism. Leave it out, or use unsloth and trl directly."
            )
        if self.accelerator.distributed_type not in _DATA_PARALLEL:
            raise ValueError(
                f"This launch uses {self.accelerator.distributed_type.value}, and accelerate_unsloth trains with plain "
                "data parallelism. Launch with unsloth_ddp.yaml, or use trl's own trainer."
            )

    def _resolve_policies(self) -> None:
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        world_size = self.accelerator.num_processes
        self._gradients_are_small = trainable <= gradient_sync.AFTER_BACKWARD_MAX_TRAINABLE
        takes_count = self.model_accepts_loss_kwargs and self.loss is not None and self._balance is None
        total = sum(p.numel() for p in self.model.parameters())
        # It would start the training of one rank again, while the others go on. A micro-batch that does not fit is cut.
        self.args.auto_find_batch_size = False
        self.gradient_sync = gradient_sync.resolve(
            self.plugin.gradient_sync, world_size, trainable, total, takes_count
        )
        # The token count of a step is needed by every rank under DDP, and by no other rank under our own reduction.
        self.token_mean_was_off = world_size > 1 and not self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = self.gradient_sync.mode == "overlapped"
        if self.gradient_sync.mode == "after_backward":
            # Device placement and mixed precision as always, but no DDP around the model.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    # ---- Construction ----

    def _build_accelerator_args(self, **kwargs):
        """The Trainer's accelerator, with the plugin's DDP preset; the user's own `ddp_*` arguments win."""
        args = super()._build_accelerator_args(**kwargs)
        (handler,) = args["kwargs_handlers"]
        names = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
        given = {name: getattr(self.args, f"ddp_{name}") for name in names}
        chosen = {name: value for name, value in given.items() if value is not None}
        if self.plugin.find_unused_parameters is None:
            chosen.setdefault("find_unused_parameters", handler.find_unused_parameters)
        args["kwargs_handlers"] = [self.plugin.ddp_kwargs(**chosen)]
        return args

    def _prepare_dataset(self, dataset, *args, **kwargs):
        """Run TRL's or Unsloth's preparation, once per node; the last argument of both is the name of the split."""
        check_not_empty(dataset, "given")
        prepare = super()._prepare_dataset
        split = kwargs.get("dataset_name") or args[-1]
        return prepare_once(dataset, lambda rows: prepare(rows, *args, **kwargs), split)

    # ---- The step ----

    def _prepare_for_training(self, *args, **kwargs):
        if self.gradient_sync.mode == "overlapped":
            # An evaluation before the training marks the model as prepared, and accelerate then leaves DDP out without a
            # word (accelerate 1.15, `Accelerator.prepare_model`). Delete this when it tells the two apart.
            self.model._is_accelerate_prepared = False
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.gradient_sync.mode == "overlapped" and not isinstance(
            self.model_wrapped, torch.nn.parallel.DistributedDataParallel
        ):
            raise RuntimeError(
                f"Under gradient_sync='overlapped' accelerate should have wrapped the model in DistributedDataParallel, and "
                f"made it a {type(self.model_wrapped).__name__}. Use gradient_sync='after_backward'."
            )
        if self.gradient_sync.mode == "after_backward":
            self._reducer = FlatReducer(self.model.parameters())
            self._reducer.broadcast_parameters()
        logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        if self.gradient_sync.mode == "overlapped" and not self.is_world_process_zero():
            logged = []  # what each rank counts is summed when it is logged
        self._num_tokens = torch.tensor(
            float(logged[-1] if logged else 0), device=self.args.device, dtype=torch.float64
        )
        self._resolve_attention()
        self._plan_step()
        if self._balance is not None:
            self._undo_after_training.enter_context(self._balance.installed(self.model))
        if self._planned_sampler() is not None:
            self._try_custom_loss(self._first_sample())
        for noted in getattr(self, "_metrics", {}).values():
            noted.clear()  # what the probe and the trial have noted
        self._metric_book = loss.MetricBook(METRICS)
        if self.accelerator.scaler is not None:
            self._undo_after_training.callback(allow_steps_without_gradients(self.accelerator.scaler).undo)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)  # or the probe's, which is larger, would be reported
        startup_table.show(self, choice)
        return prepared

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-steps of this rank's next optimizer step, each a [`Slot`] of [`MicroBatch`]es."""
        self._monitor.begin_step()
        if self._in_step:  # a stream has ended inside of an effective batch; what is left of it belongs to no step
            self.model.zero_grad()
            if self._balance is not None:
                self._balance.end_step()
        self._in_step = True
        slots = [
            inputs if isinstance(inputs, Slot) else Slot([inputs]) for inputs in islice(epoch_iterator, num_batches)
        ]
        batches = [inputs for slot in slots for inputs in slot]
        # Unsloth and transformers decide here whether the model's loss divides by the count, and count for it.
        _, num_items = super().get_batch_samples(iter(batches), len(batches), device)
        slots = [Slot(self._micro_batches(slot)) for slot in slots]
        work = [batch for slot in slots for batch in slot]
        self._step_samples = [index for batch in work for index in batch.samples]
        counted = sum(batch.items for batch in work) if num_items is None else num_items
        self._step_items = torch.as_tensor(counted, device=device, dtype=torch.float64)
        self._own_tokens = sum(count_tokens(batch.inputs) for batch in work if not batch.filler)
        self._step_tokens = torch.tensor(self._own_tokens, device=device, dtype=torch.float64)
        self._step_loss = torch.zeros((), device=device, dtype=torch.float64)
        self._try_custom_loss(work)
        self._count_routes([batch for batch in work if batch.items])
        return slots, num_items

    def _micro_batches(self, slot: Slot) -> list[MicroBatch]:
        samples = getattr(slot, "samples", [[]] * len(slot))
        fillers = [bool(indices) and indices[0] < 0 for indices in samples]
        return [
            MicroBatch(inputs, 0 if filler else self._count_items(inputs), [] if filler else indices, filler)
            for inputs, indices, filler in zip(slot, samples, fillers, strict=True)
        ]

    def _count_items(self, batch) -> int:
        """Positions of a collated batch whose loss counts, as this model's loss sees them."""
        return count_items(batch, getattr(self, "_loss_shifts_labels", True))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """
        Forward and backward of one micro-batch, and after the last of a step the reduction over all ranks.

        Returns:
            `torch.Tensor`: the loss of the whole step over all ranks, with its last micro-batch, and zero before; under
            `overlapped` what the stock Trainer returns.
        """
        self._monitor.begin_work()
        if self.gradient_sync.mode == "overlapped":
            (batch,) = inputs
            value = self._learn_in_step(model, batch, num_items_in_batch)
            self._step_loss += value
            if self.accelerator.sync_gradients:
                self._end_step_without_reducer()
            return value
        value = torch.zeros((), device=self.args.device)
        for batch in inputs:
            if batch.items:  # nothing can be learnt where every label is masked
                value = value + self._learn(model, batch, num_items_in_batch)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(value)  # a scaler that has scaled nothing cannot take part in the step
        self._step_loss += value
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(value)
        self._forget_skipped_items()
        if self.gradient_sync.mode == "none":
            self._end_step_without_reducer()
            return self._step_loss.to(value.dtype)
        worked = self._monitor.end_work(self._own_tokens)
        totals = self._reducer.reduce(
            self._step_loss,
            self._step_items,
            self._step_tokens,
            wants_stop=self._stop.signal is not None,
            ran_out_of_memory=self._failed_tokens > 0,
            check_gradients=self.accelerator.scaler is None,
        )
        self._monitor.add_work(worked)
        self._num_tokens += totals.tokens
        self._note_end_of_step(totals.stop_votes, totals.nonfinite_ranks)
        if totals.ranks_out_of_memory:
            self._plan_smaller()
        return totals.loss.to(value.dtype)

    def _end_step_without_reducer(self) -> None:
        """One process, or DDP: there is no reduction of ours that could carry votes and bad numbers."""
        worked = self._monitor.end_work(self._own_tokens)
        if self._failed_tokens and self.gradient_sync.mode == "none":
            self._plan_smaller()
        self._num_tokens += self._step_tokens
        if self.gradient_sync.mode == "overlapped" and not self._step_items:
            for (
                parameter
            ) in self.model.parameters():  # no rank has a label: DDP leaves zeros, which momentum would act on
                parameter.grad = None
        finite = self._own_numbers_are_finite(self._step_loss)
        notes = torch.tensor([float(self._stop.signal is not None), float(not finite)], device=self.args.device)
        notes = self.accelerator.reduce(notes) if self.gradient_sync.mode == "overlapped" else notes
        votes, bad = notes.tolist()
        self._monitor.add_work(worked)
        ranks = []
        if bad:
            finite_losses = channel().gather("nonfinite", math.isfinite(self._step_loss))
            ranks = [rank for rank, is_finite in enumerate(finite_losses) if not is_finite]
            ranks = ranks or list(range(len(finite_losses)))  # DDP has spread bad gradients to all of them
        self._note_end_of_step(int(votes), ranks)

    def floating_point_ops(self, inputs):
        """Operations of all micro-batches of a micro-step, as the Trainer estimates them."""
        return sum(super(DistributedTrainerMixin, self).floating_point_ops(batch.inputs) for batch in inputs)

    def _track_num_input_tokens(self, inputs):
        """Count the tokens of a micro-step at once, because the Trainer gathers them over all ranks."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        together = {}
        for name in (getattr(self.model, "main_input_name", "input_ids"), "attention_mask"):
            rows = [batch.inputs[name].reshape(1, -1) for batch in inputs if not batch.filler and name in batch.inputs]
            if rows or name != "attention_mask":
                together[name] = torch.cat(rows, dim=1) if rows else torch.empty(1, 0, dtype=torch.long)
        super()._track_num_input_tokens(together)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            tokens = self._num_tokens
            if self.gradient_sync.mode == "overlapped":
                tokens = self.accelerator.reduce(tokens, reduction="sum")
            logs["num_tokens"] = int(tokens.item())
            logs |= self._metric_book.means(self.args.device)
            if self._balance is not None and self._balance.values:
                values, self._balance.values = self._balance.values, []
                logs["aux_loss"] = sum(values) / len(values)
            if self.plugin.monitor:
                logs |= self._read_ranks()
        return super().log(logs, *args, **kwargs)

    # ---- Saving ----

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the model on rank 0, while the others wait."""
        save_model, folder = super().save_model, output_dir or self.args.output_dir

        def save():
            save_model(output_dir, _internal_call=_internal_call)
            rank0_writes.follow_umask(folder)

        rank0_writes.write_once("model", save)

    def push_to_hub(self, *args, **kwargs):
        """Push from rank 0, while the others wait."""
        return rank0_writes.write_once("push_to_hub", functools.partial(super().push_to_hub, *args, **kwargs))
