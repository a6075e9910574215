"""What a fine-tune of a model will take on each GPU, item by item, before anything is loaded."""

from dataclasses import dataclass

from . import budget
from .budget import GIB, ModelShape
from .optimizer_state import state_bytes

EXPERTS_NOTE = (
    "the weights of experts are counted, but their activations were never measured: they are taken for those of a dense "
    "layer as wide as the active experts"
)


@dataclass(frozen=True)
class Estimate:
    """
    Memory of one GPU, by what holds it.

    Args:
        weights_gib (`float`): The model, with the constants of its quantization.
        adapters_gib (`float`): LoRA weights, in 32 bits.
        gradients_gib (`float`): Their gradients.
        optimizer_gib (`float`): The optimizer's state.
        reduction_gib (`float`): The flat buffer of the step's all-reduce; 0 on one GPU.
        workspace_gib (`float`): A dequantized weight, and cuBLAS's workspace.
        context_gib (`float`): The CUDA context and Triton's kernels, outside of PyTorch's count.
        token_kib (`float`): Activations of a token in the layers of a model; a loss in chunks comes on top.
        shape ([`ModelShape`]): Sizes of the model.
        checkpointing (`bool`): Whether activations are recomputed.
    """

    weights_gib: float
    adapters_gib: float
    gradients_gib: float
    optimizer_gib: float
    reduction_gib: float
    workspace_gib: float
    context_gib: float
    token_kib: float
    shape: ModelShape
    checkpointing: bool

    @property
    def resting_gib(self) -> float:
        """Everything but activations."""
        held = (self.weights_gib, self.adapters_gib, self.gradients_gib, self.optimizer_gib, self.reduction_gib)
        return sum(held) + self.workspace_gib + self.context_gib

    def peak_gib(self, tokens: int) -> float:
        """With a micro-batch of so many tokens."""
        return self.resting_gib + self.shape.activation_bytes(tokens, self.checkpointing) / GIB

    def most_gib(self, tokens: int) -> float:
        """With the micro-batch of up to so many tokens that takes the most."""
        return self.resting_gib + self.shape.activation_bytes_at_most(tokens, self.checkpointing) / GIB

    def largest_micro_batch(self, gpu_gib: float, fraction: float = 0.9) -> int:
        """Tokens of the largest micro-batch in that part of a GPU; 0 if nothing fits."""
        return self.shape.tokens_within((gpu_gib * fraction - self.resting_gib) * GIB, self.checkpointing)


def estimate(
    shape: ModelShape,
    load_in_4bit: bool = True,
    r: int = 16,
    optim: str = "adamw_8bit",
    checkpointing: bool = True,
    num_gpus: int = 1,
) -> Estimate:
    """
    Estimate a LoRA fine-tune with Unsloth.

    Args:
        shape ([`ModelShape`]): Sizes of the model.
        load_in_4bit (`bool`, *optional*, defaults to `True`): NF4 weights instead of 16 bits; embeddings stay in 16.
        r (`int`, *optional*, defaults to `16`): Rank of the adapters, on all linear layers.
        optim (`str`, *optional*, defaults to `"adamw_8bit"`): The Trainer's optimizer.
        checkpointing (`bool`, *optional*, defaults to `True`): Unsloth's offloaded gradient checkpointing.
        num_gpus (`int`, *optional*, defaults to `1`): Processes; each holds all of it.

    Returns:
        [`Estimate`]

    Raises:
        ValueError: for a number below 1, or an optimizer that the Trainer does not know.

    Example:

    ```python
    >>> from accelerate_unsloth.memory.estimate import estimate
    >>> from accelerate_unsloth.memory.budget import ModelShape
    >>> llama_8b = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
    >>> round(estimate(llama_8b).weights_gib, 1)
    5.3
    ```
    """
    for name, value in {"r": r, "num_gpus": num_gpus}.items():
        if value < 1:
            raise ValueError(f"{name}={value!r} is not a whole number of at least 1. Give one.")
    bytes_per_weight = budget.NF4_BYTES if load_in_4bit else 2
    adapters = shape.lora_values(r)
    return Estimate(
        weights_gib=(shape.stored_linear_values * bytes_per_weight + 2 * shape.embedding_values) / GIB,
        adapters_gib=4 * adapters / GIB,
        gradients_gib=4 * adapters / GIB,
        optimizer_gib=state_bytes(optim) * adapters / GIB,
        reduction_gib=4 * adapters / GIB if num_gpus > 1 else 0.0,
        workspace_gib=shape.workspace_bytes / GIB,
        context_gib=budget.CONTEXT_GIB,
        token_kib=(shape.working_bytes + (0 if checkpointing else shape.kept_bytes)) / 1024,
        shape=shape,
        checkpointing=checkpointing,
    )
