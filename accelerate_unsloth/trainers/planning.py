"""
Which samples run where and in what pieces: the policies of data and memory, resolved when training begins.

The samples of a step follow from the user's arguments alone. Attention kernel, gradient checkpointing and micro-batches
follow from lengths and memory.
"""

import contextlib

from ..engines import kernels
from ..engines.loaded import choice

# isort: split
from torch.utils.data import IterableDataset

from ..data.lengths import count_different, lengths_of
from ..data.loader import PlannedDataLoader, worker_seeding
from ..data.packing import RowCost
from ..data.sampler import EffectiveBatchSampler, EvaluationSampler
from ..launch.channel import channel
from ..memory import budget, model_shape, optimizer_state
from ..policies import activation_checkpointing, attention, micro_batch

# Tensor cores read 16 bytes at a time. A row without padding whose tokens are no multiple of 8 sends every product that
# sums over tokens to a slow kernel (6% of a step on an H200, `benchmarks/profile_step.py`).
_ALIGNED_TOKENS = 8


class PlanningMixin:
    """Dealing samples, and the policies behind it, for [`DistributedTrainerMixin`]."""

    def __init__(self, *args, **kwargs):
        self.attention = self.checkpointing = self.micro_batch = None
        self._train_lengths = None
        super().__init__(*args, **kwargs)
        padding_free = getattr(self.data_collator, "padding_free", False)
        if padding_free and choice.name == "unsloth" and getattr(self.data_collator, "pad_to_multiple_of", 0) is None:
            self.data_collator.pad_to_multiple_of = _ALIGNED_TOKENS  # its lengths, and so its loss, are as before

    # ---- Data ----

    def plans_samples(self, dataset) -> bool:
        """Whether the samples of a data set can be dealt exactly, which takes a length and random access."""
        return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)

    @property
    def balances_tokens(self) -> bool:
        """Whether samples are dealt to ranks by cost instead of by number."""
        return self.plugin.balance_tokens and self.accelerator.num_processes > 1 and self._train_lengths is not None

    @property
    def _row_cost(self) -> RowCost:
        padding_free = getattr(self, "padding_free", False) or getattr(self.args, "padding_free", False)
        shape = model_shape.shape_of(self.model)
        return RowCost(padded=not padding_free, attention_per_token=shape.attention_per_token if shape else 0.0)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        """Deal the samples ourselves where we can; predictions, and those for metrics, keep accelerate's loader."""
        loss_only = description == "Evaluation" and self.compute_metrics is None
        if not self.plans_samples(dataset) or not (is_training or loss_only):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        if is_training:
            sampler = self._train_sampler(dataset, batch_size)
        else:
            place, lengths = self.accelerator, lengths_of(dataset) if self.plugin.balance_tokens else None
            sampler = EvaluationSampler(len(dataset), place.num_processes, place.process_index, batch_size, lengths)
        if hasattr(dataset, "column_names"):
            dataset, collator = self._remove_unused_columns(dataset, description=description), self.data_collator
        else:
            collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        workers = self.args.dataloader_num_workers
        return PlannedDataLoader(
            dataset,
            sampler,
            collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=worker_seeding(workers, self.accelerator.process_index) if is_training else None,
        )

    def _train_sampler(self, dataset, batch_size: int) -> EffectiveBatchSampler:
        self._train_lengths = lengths_of(dataset)
        sampler = EffectiveBatchSampler(
            len(dataset),
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            micro_batch=batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
            strategy=self.args.train_sampling_strategy,
            lengths=self._train_lengths,
            balance=self.balances_tokens,
            cost=self._row_cost,
            in_step=self.gradient_sync.mode == "overlapped",
        )
        if sampler.num_steps == 0:
            raise ValueError(
                f"dataloader_drop_last=True leaves nothing of {len(dataset)} samples, because an effective batch has "
                f"{sampler.effective_batch}. Leave dataloader_drop_last out, or make the effective batch smaller."
            )
        return sampler

    # ---- Policies ----

    def train(self, *args, **kwargs):
        with contextlib.ExitStack() as self._undo_after_training:
            return super().train(*args, **kwargs)

    def _resolve_attention(self) -> None:
        """Choose the attention kernel, for the time of the training."""
        found = kernels.describe(choice.name)
        different = count_different(self.train_dataset, self._train_lengths) if found["sdpa_runs_segments"] else 0
        self.attention = attention.resolve(self.plugin.attention, lengths=different, **found)
        self._undo_after_training.enter_context(attention.applied(self.attention))

    def _plan_step(self) -> None:
        """Choose gradient checkpointing and micro-batches, the same on all ranks, and try them."""
        lengths, sampler = self._train_lengths, self._planned_sampler()
        self._longest = 0 if lengths is None or not len(lengths) else int(lengths.max())
        self._fitting_tokens = without, with_ = self._tokens_that_fit()
        rank_tokens = 0 if sampler is None or lengths is None else float(lengths.mean()) * sampler.effective_batch
        rank_tokens /= self.accelerator.num_processes
        self._splitting = {
            "requested": self.plugin.micro_batch,
            "lengths_known": lengths is not None and sampler is not None,
            "in_step": self.gradient_sync.mode == "overlapped",
            "noisy": bool(getattr(self.args, "neftune_noise_alpha", None)),
        }
        plans_memory = micro_batch.why_fixed(**self._splitting) is None
        self.checkpointing = activation_checkpointing.resolve(
            self.plugin.gradient_checkpointing,
            switched_off=not kernels.wants_recomputation(self.model),
            asked_for=getattr(self.model, "_accelerate_unsloth_checkpointing_asked", None),
            without=without if plans_memory else 0,
            with_=with_,
            longest=self._longest,
            rank_tokens=rank_tokens,
            has_way_back=self._gradients_are_small,
        )
        if self._balance is not None and choice.name == "unsloth" and self.plugin.gradient_checkpointing == "auto":
            why = "the balancing loss of the experts has no gradient where Unsloth recomputes them"
            self.checkpointing = activation_checkpointing.CheckpointingChoice("none", why)
        self._apply_checkpointing()
        self._plan_micro_batches()
        if self.micro_batch.mode == "auto":
            self._probe_until_it_fits(sampler, self._longest)
            sampler.token_budget = self.micro_batch.token_budget

    def _plan_micro_batches(self) -> None:
        """Choose their size by what fits with the activations that are kept now."""
        without, with_ = self._fitting_tokens
        fits = with_ if kernels.recomputes(self.model) else without
        self.micro_batch = micro_batch.resolve(
            most_tokens=self.plugin.micro_batch_tokens, fits=fits or None, longest=self._longest, **self._splitting
        )

    def _recompute_instead(self, why: str) -> bool:
        """
        Recompute activations from here on, where keeping them was our choice and did not fit.

        Args:
            why (`str`): One clause, for the start-up table.

        Returns:
            `bool`: whether that changed anything.
        """
        if not self.checkpointing.may_recompute:
            return False
        self.checkpointing = activation_checkpointing.CheckpointingChoice("unsloth", why)
        self._apply_checkpointing()
        self._plan_micro_batches()
        return True

    def _planned_sampler(self) -> EffectiveBatchSampler | None:
        sampler = getattr(self.callback_handler.train_dataloader, "batch_sampler", None)
        return sampler if isinstance(sampler, EffectiveBatchSampler) else None

    def _apply_checkpointing(self) -> None:
        if self.checkpointing.mode == "unchanged":
            return
        before = kernels.set_recomputation(self.model, self.checkpointing.mode == "unsloth")
        self._undo_after_training.callback(kernels.set_recomputation, self.model, before)

    def _tokens_that_fit(self) -> tuple[int, int]:
        """
        By arithmetic, on the rank with the least memory, if activations are kept and if they are recomputed; 0 where memory
        is not planned.
        """
        shape = model_shape.shape_of(self.model) if kernels.plans_memory(choice.name) else None
        if shape is None:
            return 0, 0
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        left_bytes = budget.read(self.args.device, self.plugin.memory_fraction).left_bytes
        parameters, width = sum(p.numel() for p in trainable), max((p.element_size() for p in trainable), default=4)
        state_bytes = optimizer_state.state_bytes_or_adams(self.args.optim)
        fitting = [
            budget.tokens_that_fit(shape, left_bytes, parameters, width, state_bytes, recompute)
            for recompute in (False, True)
        ]
        kept, recomputed = (
            max(1, min(ranks)) for ranks in zip(*channel().gather("tokens that fit", fitting), strict=True)
        )
        return kept, recomputed
