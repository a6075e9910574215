"""What of a LoRA fine-tune fits a GPU, and the step plan that follows, with its explanation."""

from dataclasses import dataclass, replace

from ..memory.budget import ModelShape
from ..memory.estimate import EXPERTS_NOTE, Estimate, estimate
from ..plugin import UnslothPlugin
from ..policies.plan import Facts, StepPlan, plan

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
    max_seq_length: int = 2048
    load_in_4bit: bool = True
    r: int = 16
    optim: str = "adamw_8bit"

    def estimate(self, recompute: bool) -> Estimate:
        return estimate(self.shape, self.load_in_4bit, self.r, self.optim, recompute, self.num_gpus)

    def tokens(self, recompute: bool) -> int:
        """Return the tokens of the largest micro-batch."""
        return self.estimate(recompute).largest_micro_batch(self.gpu_gib, self.fraction)

    def plan(self, plugin: UnslothPlugin) -> StepPlan:
        """Plan a step of samples of full length; raise `ValueError` if not even one fits."""
        recompute = plugin.gradient_checkpointing != "none"
        if self.tokens(recompute) < self.max_seq_length:
            raise ValueError(self._does_not_fit(recompute))
        step_tokens = _SAMPLES_PER_STEP * self.max_seq_length
        return plan(plugin, Facts(self.max_seq_length, step_tokens, self.tokens(False), self.tokens(True)))

    def explain(self, chosen: StepPlan) -> dict[str, str]:
        activations = {
            "unsloth": "recomputed",
            "none": "kept",
            "unchanged": "as the script says, recomputed if it says nothing",
        }[chosen.checkpointing.mode]
        budget = chosen.micro_batch.token_budget
        if budget is None:
            split = f"as the script splits them: {chosen.micro_batch.reason}; up to {self.tokens(chosen.recomputes):,} tokens fit"
        else:
            split = f"at most {budget:,} tokens, {budget // self.max_seq_length} full samples"
        return {
            "model": self.name,
            "script": f"load_in_4bit={self.load_in_4bit}, max_seq_length={self.max_seq_length}, r={self.r} on all linear "
            f"layers, optim={self.optim!r}",
            "activations": f"{activations}, for steps of {_SAMPLES_PER_STEP} full samples per process: "
            f"{chosen.checkpointing.reason}",
            "micro-batches": f"{split}; the samples of a step stay the script's",
            **({"experts": EXPERTS_NOTE} if self.shape.has_experts else {}),
        }

    def _does_not_fit(self, recompute: bool) -> str:
        held = self.estimate(recompute)
        peak_gib, limit_gib = held.most_gib(self.max_seq_length), self.gpu_gib * self.fraction
        return (
            f"{self.name}, in {4 if self.load_in_4bit else 16} bits, does not fit {self.gpu_gib:.1f} GiB: each GPU holds "
            f"{held.weights_gib:.2f} GiB of weights, {held.adapters_gib + held.gradients_gib + held.optimizer_gib:.2f} of "
            f"adapters, gradients and optimizer, {held.reduction_gib + held.workspace_gib:.2f} of buffers and "
            f"{held.context_gib:.2f} of CUDA's, and a sample of {self.max_seq_length:,} tokens takes "
            f"{peak_gib - held.resting_gib:.2f} with activations {'recomputed' if recompute else 'kept'}. That is "
            f"{peak_gib:.2f} GiB, and {self.fraction:g} of the memory is {limit_gib:.2f}. {self._fixes(peak_gib, recompute)}"
        )

    def _fixes(self, peak_gib: float, recompute: bool) -> str:
        fixes = []
        if not recompute and self.tokens(True) >= self.max_seq_length:
            fixes.append("let activations be recomputed (gradient_checkpointing='auto')")
        if replace(self, load_in_4bit=True).tokens(recompute) >= self.max_seq_length:
            fixes.append("set load_in_4bit=True")
        if tokens := self.tokens(recompute):
            fixes.append(f"lower max_seq_length to at most {tokens:,}")
        fixes += ["choose a smaller model", f"use GPUs of at least {peak_gib / self.fraction:.1f} GiB"]
        advice = ", ".join(fixes[:-1]) + " or " + fixes[-1]
        return f"{advice[0].upper()}{advice[1:]}; more GPUs do not help, because each holds the whole model."
