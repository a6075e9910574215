"""
What every trainer shares: exact steps on any number of processes, whatever Unsloth or TRL compute inside them.

The mixin sits in front of a TRL trainer, as Unsloth left it or plain, and overrides where the stock Trainer's ranks
would meet: the data loader, the token count, the training step, evaluation and saving. What is done there is in objects
that need no Trainer: [`StepRunner`], [`Planner`], [`Guards`], and a [`Reducer`]. Private methods of the Trainer that it
relies on are listed in `tests/launch/test_patched_points.py`.
"""

import contextlib
import functools
import inspect
from itertools import islice

from ..engines import kernels
from ..engines.select import choice

# isort: split
import torch
from transformers.utils import logging

from ..data.lengths import count_different
from ..data.loader import MicroBatch, MicroStep
from ..data.prepare import check_has_labels, prepare_once
from ..launch.topology import topology
from ..patches import patched
from ..plugin import UnslothPlugin
from ..policies import attention
from ..policies.plan import StepPlan
from ..reduction import make_reducer
from ..reliability import agreement, nonfinite
from ..reliability.grad_scaler import allow_steps_without_gradients
from ..reporting import startup_table
from ..reporting.monitor import Monitor
from ..reporting.verbosity import mute_libraries, muted_prints, without_training_banner
from . import checks, decisions
from .adapter import LossAdapter, SampleAdapter
from .checkpoints import CheckpointMixin
from .evaluation import EvaluationMixin
from .guards import Guards
from .loading import LoadingMixin
from .planner import Planner, leaves_memory
from .reporting import ReportMixin
from .step import Step, StepRunner, can_be_repeated, gradient_bytes

logger = logging.get_logger(__name__)

# Tensor cores read 16 bytes at a time. A row without padding whose tokens are no multiple of 8 sends every product that
# sums over tokens to a slow kernel (6% of a step on an H200, `benchmarks/profile_step.py`).
_ALIGNED_TOKENS = 8


class DistributedTrainerMixin(ReportMixin, CheckpointMixin, EvaluationMixin, LoadingMixin):
    """
    Mixin for TRL's trainers. Put it first among the bases.

    The loss is one over labelled tokens, or what `adapter_class` says of it.

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

    adapter_class = LossAdapter
    attention = adapter = None
    _step: Step | None = None

    # ---- Construction ----

    def __init__(self, *args, plugin: UnslothPlugin | None = None, **kwargs):
        self.plugin = checks.checked(plugin)
        if self.plugin.engine not in ("auto", choice.name):
            raise ValueError(
                f"engine={self.plugin.engine!r} comes too late: {choice.name!r} was chosen when accelerate_unsloth was "
                f"first used. Set the environment variable ACCELERATE_UNSLOTH_ENGINE={self.plugin.engine} instead."
            )
        with muted_prints():
            super().__init__(*args, **kwargs)
        if self.args.log_level_replica == "warning":  # the default, under which Unsloth's banners come from every rank
            mute_libraries()
        check_has_labels(self.train_dataset, "training")
        checks.check_launch(self)
        checks.check_metric(self)
        self.adapter = self.adapter_class(self)
        self._planner = Planner(self.model, choice.name, self.plugin, self.args.device, self.args.optim)
        self._runner = StepRunner(
            self.adapter,
            lambda: self._trainable,
            self.plugin.on_oversized,
            self._planner.fall_back,
            self._planner.may_fall_back,
            topology().rank,
        )
        self._guards = Guards(self.args.output_dir, self.plugin.watchdog_timeout_s, self.args.ddp_timeout)
        self.add_callback(self._guards)
        self._monitor = Monitor(self.args.device)
        if self.plugin.monitor:
            self.add_callback(self._monitor)
        self._settle_arguments()
        agreement.check(self)

    def _settle_arguments(self) -> None:
        """Switch off what the reduction replaces, and what would restart or split the training of one rank alone."""
        self.token_mean_was_off = self.accelerator.num_processes > 1 and not self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = self.args.auto_find_batch_size = False
        padding_free = getattr(self.data_collator, "padding_free", False)
        if padding_free and choice.name == "unsloth" and getattr(self.data_collator, "pad_to_multiple_of", 0) is None:
            self.data_collator.pad_to_multiple_of = _ALIGNED_TOKENS  # its lengths, and so its loss, are as before

    def _prepare_dataset(self, dataset, *args, **kwargs):
        """Run TRL's or Unsloth's preparation, once per node; the last argument of both is the name of the split."""
        checks.check_rows(dataset, "given", formatted=any(map(inspect.isroutine, (*args, *kwargs.values()))))
        prepare = super()._prepare_dataset
        split = kwargs.get("dataset_name") or args[-1]
        prepared = prepare_once(dataset, lambda rows: prepare(rows, *args, **kwargs), split)
        if issubclass(self.adapter_class, SampleAdapter):
            settings = kwargs.get("args") or args[1]
            checks.check_left_out(dataset, prepared, split, settings.max_length)
        return prepared

    # ---- What was decided ----

    @property
    def plan(self) -> StepPlan | None:
        """The step plan: checkpointing and micro-batches, with their reasons. `None` before training."""
        return self._planner.plan

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended the training, on any rank."""
        return self._guards.was_stopped

    @property
    def skipped_samples(self) -> list[int]:
        """Samples of this rank that did not fit the memory and were left out."""
        return self._runner.skipped_samples

    def decisions(self) -> list[startup_table.Row]:
        """Return subject, decision and reason of each choice, as the start-up table shows them."""
        return decisions.rows(self, choice)

    # ---- Training ----

    def train(self, *args, **kwargs):
        """
        Train as the Trainer does. SIGTERM and Ctrl-C finish the step and save one checkpoint, and
        `resume_from_checkpoint="auto"` resumes from the newest complete checkpoint if there is one.

        Raises:
            SystemExit: with 128 + the signal's number, after such a stop.
        """
        with (
            self._guards.around_training(),
            muted_prints(),
            without_training_banner(),
            contextlib.ExitStack() as self._undo_after_training,
        ):
            output = super().train(*args, **kwargs)
        self._guards.exit_if_stopped(self.state.global_step)
        return output

    def _prepare_for_training(self, *args, **kwargs):
        # Device placement and mixed precision as always, but no DDP around the model.
        unwrapped = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        several = self.accelerator.num_processes > 1
        with patched(self.accelerator, prepare_model=unwrapped) if several else contextlib.nullcontext():
            prepared = super()._prepare_for_training(*args, **kwargs)
        # Found once: a walk over all modules takes several milliseconds, and small steps wait for the CPU.
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._flops_per_value = None
        self._reducer = make_reducer(self._trainable, self.accelerator.num_processes)
        self._reducer.broadcast_parameters()
        logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._num_tokens = torch.tensor(
            float(logged[-1] if logged else 0), device=self.args.device, dtype=torch.float64
        )
        self._resolve_attention()
        self._plan_step()
        if self.accelerator.scaler is not None:
            self._undo_after_training.callback(allow_steps_without_gradients(self.accelerator.scaler).undo)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)  # or the probe's, which is larger, would be reported
        if self.is_world_process_zero():
            startup_table.show(self.decisions())
        return prepared

    def _resolve_attention(self) -> None:
        """Choose the attention kernel, for the time of the training."""
        found = kernels.describe(choice.name, self.adapter.padded)
        different = count_different(self.train_dataset, self._train_lengths) if found["sdpa_runs_segments"] else 0
        self.attention = attention.resolve(self.plugin.attention, attention.Facts(lengths=different, **found))
        self._undo_after_training.enter_context(attention.applied(self.attention))

    def _plan_step(self) -> None:
        """Plan checkpointing and micro-batches, the same on all ranks, and try them."""
        sampler, balance = self._planned_sampler(), self.adapter.balance
        needs_activations = balance is not None and choice.name == "unsloth"
        why = "the balancing loss of the experts has no gradient where Unsloth recomputes them"
        self._planner.resolve(
            sampler,
            self._train_lengths,
            self._undo_after_training,
            noisy=bool(getattr(self.args, "neftune_noise_alpha", None)),
            can_fall_back=can_be_repeated(self._trainable),
            keep_because=why if needs_activations else "",
        )
        self._planner.probe(self._fits)
        if balance is not None:
            self._undo_after_training.enter_context(balance.installed(self.model))
        if sampler is not None:
            self.adapter.begin_training(next(iter(sampler.plan(0)[sampler.rank]), []))

    def _fits(self, samples: list[int], in_parts: bool) -> bool:
        """Return whether a forward and backward of these samples fits next to what a step holds besides."""
        inputs = self.adapter.collate(samples)
        held_bytes = gradient_bytes(self._trainable) if in_parts else 0
        if self.optimizer is None or not any(self.optimizer.state.values()):  # a resumed run has its state already
            held_bytes += self._planner.state_bytes_of(self._trainable)
        items = self.adapter.items(inputs)
        _, self.step_item_count = super().get_batch_samples(iter([inputs]), 1, self.args.device)
        self.current_gradient_accumulation_steps = 1
        step = Step.of([], items, 0, self.args.device)

        def run():
            self.adapter.learn(inputs, items, step)

        return leaves_memory(run, self._trainable, held_bytes, self.args.device, self.plugin.memory_fraction)

    # ---- The step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Begin this rank's next optimizer step; return its micro-steps, each a [`MicroStep`] of [`MicroBatch`]es."""
        self._monitor.begin_step()
        self._planner.begin_step()
        if self._step is not None:  # a stream ended inside an effective batch; what is left of it belongs to no step
            self.model.zero_grad()
            self.adapter.end_step()
        given = [
            inputs if isinstance(inputs, MicroStep) else MicroStep([inputs])
            for inputs in islice(epoch_iterator, num_batches)
        ]
        batches = [inputs for micro_step in given for inputs in micro_step]
        # Unsloth and transformers decide here whether the model's loss divides by the count, and count for it.
        _, self.step_item_count = super().get_batch_samples(iter(batches), len(batches), device)
        micro_steps = [MicroStep(self._micro_batches(micro_step)) for micro_step in given]
        work = [batch for micro_step in micro_steps for batch in micro_step]
        counted = self.step_item_count
        items = sum(batch.items for batch in work) if counted is None else counted
        tokens = sum(self.adapter.tokens(batch.inputs) for batch in work)
        self._step = Step.of(work, items, tokens, device, self.state.global_step + 1)
        self.adapter.begin_step(self._step)
        return micro_steps, counted

    def _micro_batches(self, micro_step: MicroStep) -> list[MicroBatch]:
        samples = getattr(micro_step, "samples", [[]] * len(micro_step))
        return [
            MicroBatch(inputs, self.adapter.items(inputs), indices)
            for inputs, indices in zip(micro_step, samples, strict=True)
        ]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """
        Forward and backward of one micro-step, and after the last of a step the reduction over all ranks.

        Returns:
            `torch.Tensor`: the loss of the whole step over all ranks, with its last micro-step, and zero before.
        """
        self._monitor.begin_work()
        value = self._runner.run(self._step, inputs)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(value)  # a scaler that has scaled nothing cannot take part in the step
        return self._end_step().to(value.dtype) if self.accelerator.sync_gradients else torch.zeros_like(value)

    def stock_training_step(self, inputs, num_items_in_batch) -> torch.Tensor:
        """Run the training step of TRL or Unsloth on one micro-batch."""
        return super().training_step(self.model_wrapped, inputs, num_items_in_batch)

    def _end_step(self) -> torch.Tensor:
        """Meet the other ranks; return the loss of the step."""
        step, self._step = self._step, None
        step.leave_out_skipped(self._trainable)
        worked = self._monitor.end_work(step.tokens)
        totals = self._reducer.reduce(
            step.loss,
            step.items,
            torch.tensor(step.tokens, device=step.items.device, dtype=torch.float64),
            wants_stop=self._guards.wants_stop,
            ran_out_of_memory=step.failed_tokens > 0,
            check_gradients=self.accelerator.scaler is None,
        )
        self._monitor.add_work(worked)
        self._num_tokens += totals.tokens
        self.adapter.end_step()
        self._guards.note_votes(totals.stop_votes)
        scaled = self.accelerator.scaler is not None
        said = nonfinite.handle(
            totals.nonfinite_ranks,
            step.number,
            step.samples,
            self.plugin.on_nonfinite,
            self._trainable,
            scaled,
        )
        self._tell(said, logger.warning)
        if totals.ranks_out_of_memory:
            fell_back, self._runner.fell_back = self._runner.fell_back, False
            self._tell(self._planner.lower(step.failed_tokens, fell_back, step.number), print)
        return totals.loss

    def _tell(self, message: str | None, say) -> None:
        if message is not None and self.is_world_process_zero():
            say(message)

    def floating_point_ops(self, inputs):
        """Return the operations of a micro-step, by one estimate of the Trainer, which would count all parameters each time."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if self._flops_per_value is None:
            self._flops_per_value = super().floating_point_ops({name: torch.empty(1)})
        return self._flops_per_value * sum(batch.inputs[name].numel() for batch in inputs if name in batch.inputs)

    def _track_num_input_tokens(self, inputs):
        """Count the tokens of a micro-step at once, because the Trainer gathers them over all ranks."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        together = {}
        for name in (getattr(self.model, "main_input_name", "input_ids"), "attention_mask"):
            rows = [batch.inputs[name].reshape(1, -1) for batch in inputs if name in batch.inputs]
            if rows or name != "attention_mask":
                together[name] = torch.cat(rows, dim=1) if rows else torch.empty(1, 0, dtype=torch.long)
        super()._track_num_input_tokens(together)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["num_tokens"] = int(self._num_tokens.item())
            logs |= self.adapter.logs()
            if self.plugin.monitor:
                logs |= self._read_ranks()
        return super().log(logs, *args, **kwargs)
