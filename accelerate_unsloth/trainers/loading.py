"""Which samples a rank trains and evaluates on: the Trainer's loaders, with our samplers where samples can be planned."""

from torch.utils.data import IterableDataset

from ..data.loader import PlannedDataLoader, worker_seeding
from ..data.packing import RowCost
from ..data.sampler import EffectiveBatchSampler, EvaluationSampler
from ..memory import model_shape


class LoadingMixin:
    """Data loaders, for [`DistributedTrainerMixin`]."""

    _train_lengths = None

    def plans_samples(self, dataset) -> bool:
        """Return whether the samples of a dataset can be assigned exactly, which takes a length and random access."""
        return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)

    @property
    def balances_tokens(self) -> bool:
        """Whether samples are assigned to ranks by cost instead of by number."""
        return self.plugin.balance_tokens and self.accelerator.num_processes > 1 and self._train_lengths is not None

    @property
    def _row_cost(self) -> RowCost:
        shape = model_shape.shape_of(self.model)
        return RowCost(padded=self.adapter.padded, attention_per_token=shape.attention_per_token if shape else 0.0)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        """Plan the samples where that is possible; predictions, and those for metrics, keep accelerate's loader."""
        loss_only = description == "Evaluation" and self.compute_metrics is None
        if not self.plans_samples(dataset) or not (is_training or loss_only):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        sampler = (self._train_sampler if is_training else self._evaluation_sampler)(dataset, batch_size)
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
        self._train_lengths = self.adapter.lengths(dataset)
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
        )
        if sampler.num_steps == 0:
            raise ValueError(
                f"dataloader_drop_last=True leaves nothing of {len(dataset)} samples, because an effective batch has "
                f"{sampler.effective_batch}. Leave dataloader_drop_last out, or make the effective batch smaller."
            )
        return sampler

    def _evaluation_sampler(self, dataset, batch_size: int) -> EvaluationSampler:
        lengths = self.adapter.lengths(dataset) if self.plugin.balance_tokens else None
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        return EvaluationSampler(len(dataset), world_size, rank, batch_size, lengths)

    def _planned_sampler(self) -> EffectiveBatchSampler | None:
        sampler = getattr(self.callback_handler.train_dataloader, "batch_sampler", None)
        return sampler if isinstance(sampler, EffectiveBatchSampler) else None
