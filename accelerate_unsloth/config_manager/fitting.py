"""What fits a GPU, and whether activations are kept in it: by the arithmetic of `accelerate-unsloth estimate-memory`."""

from dataclasses import dataclass

from ..memory.budget import ModelShape
from ..memory.estimate import Estimate, estimate
from ..policies import activation_checkpointing
from ..policies.activation_checkpointing import CheckpointingChoice

# The Trainer's default batch on a device, for the time of a step; what fits does not depend on it.
ROWS_OF_A_STEP = 8


@dataclass(frozen=True)
class Workload:
    """What is to be trained, and the memory of each GPU that may be used for it."""

    shape: ModelShape
    name: str
    load_in_4bit: bool
    r: int
    optim: str
    max_seq_length: int
    num_gpus: int
    gpu_gib: float
    fraction: float

    @property
    def bits(self) -> int:
        return 4 if self.load_in_4bit else 16

    def estimate(self, recompute: bool, load_in_4bit: bool | None = None) -> Estimate:
        in_4bit = self.load_in_4bit if load_in_4bit is None else load_in_4bit
        return estimate(self.shape, in_4bit, self.r, self.optim, recompute, self.num_gpus)

    def tokens(self, recompute: bool, load_in_4bit: bool | None = None) -> int:
        """Tokens of the largest micro-batch."""
        return self.estimate(recompute, load_in_4bit).largest_micro_batch(self.gpu_gib, self.fraction)


@dataclass(frozen=True)
class Fit:
    checkpointing: CheckpointingChoice
    tokens: int  # of the largest micro-batch under that choice


def fit(work: Workload, requested: str = "auto", plans_cut: bool = True) -> Fit:
    """
    Choose whether activations are recomputed, as the trainer does it, for rows of full length.

    Args:
        work ([`Workload`]): What is to be trained.
        requested (`str`, *optional*, defaults to `"auto"`): The plugin's `gradient_checkpointing`.
        plans_cut (`bool`, *optional*, defaults to `True`):
            Whether micro-batches are cut to the memory. Where the script cuts them, its checkpointing stays as well.

    Raises:
        ValueError: if not even one row fits, with recomputation unless that was ruled out, with the arithmetic and what
            would fit.
    """
    without, with_ = work.tokens(recompute=False), work.tokens(recompute=True)
    if (without if requested == "none" else with_) < work.max_seq_length:
        raise ValueError(_too_small(work, recompute=requested != "none"))
    step = ROWS_OF_A_STEP * work.max_seq_length
    facts = activation_checkpointing.Facts(work.max_seq_length, step, without if plans_cut else None, with_)
    choice = activation_checkpointing.resolve(requested, facts)
    return Fit(choice, without if choice.mode == "none" else with_)


def _too_small(work: Workload, recompute: bool) -> str:
    held = work.estimate(recompute)
    peak, limit = held.most_gib(work.max_seq_length), work.gpu_gib * work.fraction
    return (
        f"{work.name}, in {work.bits} bits, does not fit {work.gpu_gib:.1f} GiB: each GPU holds "
        f"{held.weights_gib:.2f} GiB of weights, {held.adapters_gib + held.gradients_gib + held.optimizer_gib:.2f} of "
        f"adapters, gradients and optimizer, {held.reduction_gib + held.workspace_gib:.2f} of buffers and "
        f"{held.context_gib:.2f} of CUDA's, and a row of {work.max_seq_length:,} tokens takes "
        f"{peak - held.resting_gib:.2f} with activations {'recomputed' if recompute else 'kept'}. That is {peak:.2f} GiB, "
        f"and {work.fraction:g} of the memory is {limit:.2f}. {_remedies(work, peak, recompute)}"
    )


def _remedies(work: Workload, peak_gib: float, recompute: bool) -> str:
    ways = []
    if not recompute and work.tokens(True) >= work.max_seq_length:
        ways.append("let activations be recomputed (gradient_checkpointing='auto')")
    if work.tokens(recompute, load_in_4bit=True) >= work.max_seq_length:
        ways.append("set load_in_4bit=True")
    if tokens := work.tokens(recompute):
        ways.append(f"lower max_seq_length to at most {tokens:,}")
    ways += ["choose a smaller model", f"use GPUs of at least {peak_gib / work.fraction:.1f} GiB"]
    advice = ", ".join(ways[:-1]) + " or " + ways[-1]
    return f"{advice[0].upper()}{advice[1:]}; more GPUs do not help, because each holds the whole model."
