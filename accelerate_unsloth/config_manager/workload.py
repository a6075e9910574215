"""What of a LoRA fine-tune fits a GPU, and the step plan that follows, with its explanation."""

import functools
import sys
from dataclasses import dataclass, replace

from ..memory.budget import GIB, ModelShape
from ..memory.estimate import EXPERTS_NOTE, ITEMS, Estimate, estimate, frozen_bytes
from ..plugin import UnslothPlugin
from ..policies.plan import Facts, StepPlan, plan
from ..weights import placement

# What a placement needs that is not known before a launch.
_IF = {"replicated": "", "sharded": ", if they can", "host": ", if it has the memory"}

# The Trainer's default batch per device, for the time of a step. What fits does not depend on it.
_SAMPLES_PER_STEP = 8


@dataclass(frozen=True)
class Workload:
    """What is trained, and the memory of each GPU that may be used for it."""

    shape: ModelShape
    name: str
    gpu_gib: float
    fraction: float
    num_gpus: int
    gpus_of_machine: int
    max_seq_length: int = 2048
    load_in_4bit: bool = True
    r: int = 16
    optim: str = "adamw_8bit"
    frozen_weights: str = "auto"  # the plugin's option

    @functools.cached_property
    def placed(self) -> placement.PlacementChoice:
        """Where the frozen weights will be, if the GPUs can copy from one another, and the machine has the memory."""
        layer_bytes, other_bytes = frozen_bytes(self.shape, self.load_in_4bit)
        facts = placement.Facts(
            layers=(int(layer_bytes / self.shape.layers),) * self.shape.layers,
            other_bytes=int(other_bytes),
            local_world_size=self.gpus_of_machine,
            host_bytes=sys.maxsize,
            device_bytes=int(self.gpu_gib * GIB),
        )
        try:
            return placement.resolve(self.frozen_weights, facts)
        except MemoryError as error:
            raise ValueError(f"{self.name}, in {4 if self.load_in_4bit else 16} bits: {error}") from error

    def estimate(self, recomputed: float) -> Estimate:
        where = self.placed.mode
        sharing = self.gpus_of_machine if where == "sharded" else self.num_gpus
        return estimate(self.shape, self.load_in_4bit, self.r, self.optim, recomputed, sharing, where)

    def tokens(self, recomputed: float) -> int:
        """Return the tokens of the largest micro-batch, if this part of the layers recomputes."""
        return self.estimate(recomputed).largest_micro_batch(self.gpu_gib, self.fraction)

    def plan(self, plugin: UnslothPlugin) -> StepPlan:
        """Plan a step of samples of full length; raise `ValueError` if not even one fits."""
        recompute = plugin.gradient_checkpointing != "none"
        if self.tokens(recompute) < self.max_seq_length:
            raise ValueError(self._does_not_fit(recompute))
        step_tokens = _SAMPLES_PER_STEP * self.max_seq_length
        layers = self.shape.layers
        partial = tuple(self.tokens(number / layers) for number in range(1, layers))
        kept, recomputed = self.tokens(0), self.tokens(1)
        return plan(plugin, Facts(self.max_seq_length, step_tokens, kept, recomputed, partial_tokens=partial))

    def explain(self, chosen: StepPlan) -> dict[str, str]:
        activations = {"unsloth": "recomputed", "none": "kept", "unchanged": "as the script says"}
        choice = chosen.checkpointing
        handled = f"recomputed in {choice.label}" if choice.layers else activations[choice.mode]
        budget = chosen.micro_batch.token_budget
        if budget is None:
            fits = self.tokens(chosen.recomputed)
            split = f"as the script splits them: {chosen.micro_batch.reason}; up to {fits:,} tokens fit"
        else:
            split = f"at most {budget:,} tokens, {budget // self.max_seq_length} full samples"
        return {
            "model": self.name,
            "script": f"load_in_4bit={self.load_in_4bit}, max_seq_length={self.max_seq_length}, r={self.r} on all linear "
            f"layers, optim={self.optim!r}",
            "activations": f"{handled}, for steps of {_SAMPLES_PER_STEP} full samples per process: {choice.reason}",
            "micro-batches": f"{split}; the samples of a step stay the script's",
            "frozen weights": f"{self.placed.mode}: {self.placed.reason}{_IF[self.placed.mode]}",
            **({"experts": EXPERTS_NOTE} if self.shape.has_experts else {}),
        }

    def _does_not_fit(self, recompute: bool) -> str:
        held, tokens = self.estimate(recompute), self.max_seq_length
        peak_gib, limit_gib = held.most_gib(tokens), self.gpu_gib * self.fraction
        fixes = ["choose a smaller model", f"use GPUs of at least {peak_gib / self.fraction:.1f} GiB"]
        if fitting := self.tokens(recompute):
            fixes.insert(0, f"lower max_seq_length to at most {fitting:,}")
        if replace(self, load_in_4bit=True).tokens(recompute) >= tokens:
            fixes.insert(0, "set load_in_4bit=True")
        if not recompute and self.tokens(True) >= tokens:
            fixes.insert(0, "let activations be recomputed with gradient_checkpointing='auto'")
        items = ", ".join(f"{getattr(held, f'{item}_gib'):.2f} {item}" for item in ITEMS)
        return (
            f"{self.name}, in {4 if self.load_in_4bit else 16} bits, does not fit {self.gpu_gib:.1f} GiB. In GiB, each GPU "
            f"holds {items}, and {peak_gib - held.resting_gib:.2f} activations of a sample of {tokens:,} tokens, "
            f"{'recomputed' if recompute else 'kept'}. That is {peak_gib:.2f}, and {self.fraction:g} of the memory is "
            f"{limit_gib:.2f}. To make it fit, {', '.join(fixes[:-1])} or {fixes[-1]}."
        )
