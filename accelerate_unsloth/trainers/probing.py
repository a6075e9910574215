"""
The largest planned micro-batch, tried before training: a forward and backward that leave no trace.

Arithmetic says what fits; this finds out. What does not fit, here or in a later step, is planned smaller on all ranks.
"""

import gc

import torch

from ..data.sampler import EffectiveBatchSampler
from ..engines import kernels
from ..launch.channel import channel
from ..memory import budget, model_shape, optimizer_state
from ..policies import micro_batch

_PROBED_STEPS = 1000


class ProbeMixin:
    """Confirming a plan, and taking it back, for [`DistributedTrainerMixin`]."""

    def _probe_until_it_fits(self, sampler: EffectiveBatchSampler, longest: int) -> None:
        """
        Try more than the largest planned micro-batch, and plan smaller ones until that fits on every rank.

        Raises:
            torch.OutOfMemoryError: if not even the longest sample fits, on any rank.
        """
        while True:
            sampler.token_budget = self.micro_batch.token_budget
            samples = _worst_case(sampler)
            tokens = sampler.cost.tokens(self._train_lengths[samples].tolist())
            fitted = channel().gather("probe", self._probe_fits(samples))
            if all(fitted):
                self.micro_batch = micro_batch.confirmed(self.micro_batch, tokens, longest)
                return
            failed = [rank for rank, fits in enumerate(fitted) if not fits]
            if len(samples) == 1 or tokens <= longest:
                if self._recompute_instead(f"the longest sample, of {longest} tokens, did not fit without it"):
                    continue
                if self.plugin.on_oversized == "skip":
                    return
                raise torch.OutOfMemoryError(self._too_long(samples, tokens, failed))
            why = f"{tokens:,} did not fit on rank {', '.join(map(str, failed))}"
            self.micro_batch = micro_batch.lowered(self.micro_batch, tokens, longest, why)

    def _probe_fits(self, samples: list[int]) -> bool:
        """A forward and backward beside a stand-in for the optimizer's state; weights, gradients and dice stay."""
        batch = self._collate(samples)
        _, num_items = super().get_batch_samples(iter([batch]), 1, self.args.device)
        device, trainable = self.args.device, [p for p in self.model.parameters() if p.requires_grad]
        self.current_gradient_accumulation_steps = 1
        self._step_items = torch.as_tensor(self._count_items(batch), device=device, dtype=torch.float64)
        state_bytes = optimizer_state.state_bytes_or_adams(self.args.optim) * sum(p.numel() for p in trainable)
        if self.optimizer is not None and any(self.optimizer.state.values()):
            state_bytes = 0  # a resumed run has it already
        fits, stand_in = True, None
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                stand_in = torch.empty(state_bytes, dtype=torch.uint8, device=device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                self._learn_at_once(self.model_wrapped, batch, num_items, int(self._step_items))
            except torch.OutOfMemoryError:
                fits = False
        del stand_in
        for parameter in trainable:
            parameter.grad = None
        if device.type != "cuda":
            return fits
        peak = torch.cuda.max_memory_allocated(device)
        gc.collect()
        torch.cuda.empty_cache()
        return fits and peak <= budget.read(device, self.plugin.memory_fraction).limit_bytes

    def _too_long(self, samples: list[int], tokens: int, ranks: list[int]) -> str:
        shape = model_shape.shape_of(self.model)
        reading = budget.read(self.args.device, self.plugin.memory_fraction)
        arithmetic = ""
        if shape is not None:
            need = shape.activation_bytes(tokens, kernels.recomputes(self.model)) + shape.workspace_bytes
            arithmetic = (
                f" (about {need / budget.GIB:.2f} GiB of activations; {reading.left_bytes / budget.GIB:.2f} GiB left)"
            )
        return (
            f"Sample {samples[0]}, of {tokens} tokens, does not fit the memory of rank {', '.join(map(str, ranks))}"
            f"{arithmetic}. Use gradient checkpointing, a smaller max_length or 4-bit weights, or set on_oversized='skip' "
            "to leave such samples out."
        )

    def _lower_budget(self, tokens_that_failed: int) -> None:
        """After a rank ran out of memory in a step: plan smaller, on all ranks alike."""
        found = channel().gather("out of memory", [tokens_that_failed, self._recomputes_from_now_on])
        failed = [tokens for tokens, _ in found if tokens]
        sampler = self._planned_sampler()
        if sampler is None or sampler.token_budget is None or not failed:
            return
        why = f"{min(failed):,} ran out of memory at step {self.state.global_step + 1}"
        if any(recomputes for _, recomputes in found):
            self._recompute_instead(why)  # where it was another rank that had to
            self._recomputes_from_now_on = False
            what = f"activations are recomputed from here on: {why}"
        else:
            self.micro_batch = micro_batch.lowered(self.micro_batch, min(failed), self._longest, why)
            what = f"micro-batches are planned smaller from here on: {self.micro_batch.reason}"
        sampler.token_budget = self.micro_batch.token_budget
        if self.is_world_process_zero():
            print(what)


def _worst_case(sampler: EffectiveBatchSampler) -> list[int]:
    """
    The micro-batch with the most tokens, over all ranks and (at most 1,000) steps of the epoch, and some samples more
    within the budget.
    """

    def tokens(batch):
        return sampler.cost.tokens(sampler.lengths[batch].tolist())

    steps = range(0, sampler.num_steps, max(1, sampler.num_steps // _PROBED_STEPS))
    worst = max((batch for step in steps for batches in sampler.plan(step) for batch in batches), key=tokens)
    most = min(sampler.token_budget, int(micro_batch.PROBE_MARGIN * tokens(worst)))
    for sample in range(min(sampler.num_samples, _PROBED_STEPS)):
        if sample not in worst and tokens([*worst, sample]) <= most:
            worst = [*worst, sample]
    return worst
