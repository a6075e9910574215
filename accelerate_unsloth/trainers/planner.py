"""
The step plan of a training run: resolved from measured memory, tried before training, lowered when a rank runs out.

Arithmetic says what fits; a forward and backward of more than the largest planned micro-batch finds out. All ranks use the
same plan, that of the rank with the least memory.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from ..data.sampler import EffectiveBatchSampler
from ..engines import kernels
from ..launch.channel import channel
from ..memory import budget, model_shape, optimizer_state
from ..plugin import UnslothPlugin
from ..policies import micro_batch
from ..policies.plan import Facts, StepPlan, plan

_LOOKED_AT = 1000  # steps of an epoch, and samples, from which the worst case is taken


class Planner:
    """
    Holds the plan, and changes it on all ranks alike.

    Args:
        model ([`~torch.nn.Module`]): As the engine's `get_peft_model` returned it.
        engine (`str`): `"unsloth"` or `"reference"`.
        options ([`UnslothPlugin`]): The plugin.
        device (`torch.device`): Of this rank.
        optim (`str`): The Trainer's optimizer.

    Attributes:
        plan ([`StepPlan`]): `None` before [`resolve`].
    """

    def __init__(self, model, engine: str, options: UnslothPlugin, device: torch.device, optim: str):
        self._model, self._options, self._device = model, options, device
        self._shape = model_shape.shape_of(model) if kernels.plans_memory(engine) else None
        self._state_bytes = optimizer_state.state_bytes_or_adams(optim)
        self._sampler: EffectiveBatchSampler | None = None
        self._undo = contextlib.ExitStack()
        self._layers = kernels.layers_that_recompute(model)
        self.plan: StepPlan | None = None

    def resolve(
        self,
        sampler: EffectiveBatchSampler | None,
        lengths: np.ndarray | None,
        undo: contextlib.ExitStack,
        noisy: bool = False,
        can_fall_back: bool = True,
        keep_because: str = "",
    ) -> None:
        """
        Choose checkpointing and micro-batches, the same on all ranks, and apply the former until `undo` is closed.

        `sampler` and `lengths` (tokens of each sample) are `None` where the samples cannot be planned. The other arguments
        are those of [`Facts`].
        """
        self._sampler, self._undo = sampler, undo
        planned = sampler is not None and lengths is not None
        kept, *partial, recomputed = self._tokens_that_fit()
        facts = Facts(
            longest_tokens=int(lengths.max()) if lengths is not None and len(lengths) else 0,
            rank_tokens=float(lengths.mean()) * sampler.effective_batch / sampler.world_size if planned else 0.0,
            kept_tokens=kept,
            recomputed_tokens=recomputed,
            partial_tokens=tuple(partial),
            switched_off=not kernels.wants_recomputation(self._model),
            asked_for=getattr(self._model, "_accelerate_unsloth_checkpointing_asked", None),
            can_fall_back=can_fall_back,
            keep_because=keep_because if self._options.gradient_checkpointing == "auto" else "",
            lengths_known=planned,
            noisy=noisy,
        )
        self._use(plan(self._options, facts))

    def _use(self, new: StepPlan) -> None:
        """Apply a plan: its checkpointing where that changes, and its token budget."""
        before, self.plan = self.plan, new
        mode, layers = new.checkpointing.mode, new.checkpointing.layers
        was = None if before is None else (before.checkpointing.mode, before.checkpointing.layers)
        if mode != "unchanged" and was != (mode, layers):
            earlier = kernels.set_recomputation(self._model, mode == "unsloth")
            self._undo.callback(kernels.set_recomputation, self._model, earlier)
        self.begin_step()
        if self._sampler is not None and new.micro_batch.mode == "auto":
            self._sampler.token_budget = new.micro_batch.token_budget

    def begin_step(self) -> None:
        """Let some layers keep their activations, where that is planned: Unsloth's `for_training` switches all alike."""
        if self.plan.checkpointing.layers is not None:
            kernels.recompute_first(self._layers, self.plan.checkpointing.layers)

    def state_bytes_of(self, trainable: list[torch.nn.Parameter]) -> int:
        """Return the bytes that the optimizer will hold for these parameters."""
        return self._state_bytes * sum(p.numel() for p in trainable)

    def may_fall_back(self) -> bool:
        """Return whether activations may be recomputed after all, where they do not fit."""
        return self.plan.checkpointing.may_recompute

    def fall_back(self, why: str) -> bool:
        """Recompute activations from here on; return whether that was allowed and changed anything."""
        new = self.plan.recomputing(why)
        if new is not None:
            self._use(new)
        return new is not None

    def probe(self, fits: Callable[[Sequence[int], bool], bool]) -> None:
        """
        Try more than the largest planned micro-batch, and plan smaller ones until `fits(samples, in_parts)` is true on
        every rank; `in_parts` tells whether there are steps of several micro-batches.

        Raises:
            torch.OutOfMemoryError: if not even the longest sample fits, on any rank.
        """
        longest = self.plan.facts.longest_tokens
        while self.plan.micro_batch.mode == "auto":
            samples = worst_case(self._sampler)
            tokens = self._sampler.cost.tokens(self._sampler.lengths[samples].tolist())
            fitted = channel().gather("probe", fits(samples, in_parts(self._sampler)))
            if all(fitted):
                self._use(self.plan.confirmed(tokens))
                return
            failed = ", ".join(str(rank) for rank, fit in enumerate(fitted) if not fit)
            if len(samples) > 1 and tokens > longest:
                self._use(self.plan.lowered(tokens, f"{tokens:,} did not fit on rank {failed}"))
            elif not self.fall_back(f"the longest sample, of {longest} tokens, did not fit without it"):
                if self._options.on_oversized == "skip":
                    return
                raise torch.OutOfMemoryError(self._too_long(samples[0], tokens, failed))

    def lower(self, failed_tokens: int, fell_back: bool, step: int) -> str | None:
        """
        Plan smaller micro-batches after a rank ran out of memory in a step; all ranks come here together.

        `failed_tokens` are those of the micro-batch that did not fit this rank, or 0; `fell_back` tells whether the rank
        recomputes activations since. Return what changed, for rank 0 to print, or `None`.
        """
        found = channel().gather("out of memory", [failed_tokens, fell_back])
        failed = [tokens for tokens, _ in found if tokens]
        if self.plan.micro_batch.mode != "auto" or not failed:
            return None
        why = f"{min(failed):,} ran out of memory at step {step}"
        if any(others_fell_back for _, others_fell_back in found):
            self.fall_back(why)  # where it was another rank that had to
            return f"activations are recomputed from here on: {why}"
        self._use(self.plan.lowered(min(failed), why))
        return f"micro-batches are planned smaller from here on: {self.plan.micro_batch.reason}"

    def _tokens_that_fit(self) -> list[int | None]:
        """Return the largest micro-batch on the rank with the least memory, for each possible number of recomputed layers."""
        if self._shape is None:
            return [None, None]
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        left_bytes = budget.read(self._device, self._options.memory_fraction).left_bytes
        values, width = sum(p.numel() for p in trainable), max((p.element_size() for p in trainable), default=4)
        layers = len(self._layers) or 1
        fitting = [
            budget.tokens_that_fit(self._shape, left_bytes, values, width, self._state_bytes, number / layers)
            for number in range(layers + 1)
        ]
        return [min(ranks) for ranks in zip(*channel().gather("tokens that fit", fitting), strict=True)]

    def _too_long(self, sample: int, tokens: int, ranks: str) -> str:
        arithmetic = ""
        if self._shape is not None:
            need = self._shape.activation_bytes(tokens, self.plan.recomputed) + self._shape.workspace_bytes
            left = budget.read(self._device, self._options.memory_fraction).left_bytes
            arithmetic = f" (about {need / budget.GIB:.2f} GiB of activations; {left / budget.GIB:.2f} GiB left)"
        return (
            f"Sample {sample}, of {tokens} tokens, does not fit the memory of rank {ranks}{arithmetic}. Use gradient "
            "checkpointing, a smaller max_length or 4-bit weights, or set on_oversized='skip' to leave such samples out."
        )


def worst_case(sampler: EffectiveBatchSampler) -> list[int]:
    """Return the micro-batch with the most tokens on any rank, and some samples more within the budget."""

    def tokens(batch):
        return sampler.cost.tokens(sampler.lengths[batch].tolist())

    worst = max((batch for batches in _plans(sampler) for batch in batches), key=tokens)
    most = min(sampler.token_budget, int(micro_batch.PROBE_MARGIN * tokens(worst)))
    for sample in range(min(sampler.num_samples, _LOOKED_AT)):
        if sample not in worst and tokens([*worst, sample]) <= most:
            worst = [*worst, sample]
    return worst


def in_parts(sampler: EffectiveBatchSampler) -> bool:
    """Return whether a rank has several micro-batches in one of the steps that [`worst_case`] looks at."""
    return any(len(batches) > 1 for batches in _plans(sampler))


def _plans(sampler: EffectiveBatchSampler) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of each rank in a step, of every step of the epoch or of about 1,000 of them, evenly spread."""
    for step in range(0, sampler.num_steps, max(1, sampler.num_steps // _LOOKED_AT)):
        yield from sampler.plan(step)


def leaves_memory(
    run: Callable[[], None],
    trainable: list[torch.nn.Parameter],
    held_bytes: int,
    device: torch.device,
    fraction: float,
) -> bool:
    """
    Return whether `run`, a forward and backward, fits next to `held_bytes`: optimizer state and gradients that come later.

    Gradients of `trainable` are removed, and RNG states are as before. `fraction` of the device's memory may be used.
    """
    fits, stand_in = True, None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            stand_in = torch.empty(held_bytes, dtype=torch.uint8, device=device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            run()
        except torch.OutOfMemoryError:
            fits = False
    del stand_in
    for parameter in trainable:
        parameter.grad = None
    if device.type != "cuda":
        return fits
    peak_bytes = torch.cuda.max_memory_allocated(device)
    clear_device_cache(garbage_collection=True)
    return fits and peak_bytes <= budget.read(device, fraction).limit_bytes
