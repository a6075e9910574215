"""Estimate the memory of a LoRA fine-tune on each GPU, by item, before anything is loaded."""

from dataclasses import dataclass

from . import budget
from .budget import GIB, ModelShape
from .optimizer_state import state_bytes

EXPERTS_NOTE = (
    "the weights of experts are counted, but their activations were not measured: they are assumed to be those of a "
    "dense layer as wide as the active experts"
)

# Layers that a GPU holds at a time where they are fetched, and the part of 4-bit weights that stays on it: their constants.
FETCHED_LAYERS = 3
_CONSTANTS_BYTES = budget.NF4_BYTES - budget.NF4_PACKED_BYTES

# Two chunks of `reduction.CHUNK_BYTES`, which is not imported because it brings PyTorch.
REDUCTION_BYTES = 2 * 2**26

# The items next to activations: each is a field of `Estimate` with the suffix `_gib`.
ITEMS = ("weights", "adapters", "gradients", "optimizer", "reduction", "workspace", "context")


@dataclass(frozen=True)
class Estimate:
    """Memory of one GPU, by item."""

    weights_gib: float  # with the constants of quantization, and with slots where layers are fetched from the host
    adapters_gib: float  # in 32 bits
    gradients_gib: float
    optimizer_gib: float
    reduction_gib: float  # two chunks of the step's reduction; 0 on one GPU
    workspace_gib: float  # a dequantized weight, and cuBLAS's workspace
    context_gib: float  # CUDA context and Triton's kernels, which PyTorch does not count
    token_kib: float  # activations per token in the layers, without those of the loss
    shape: ModelShape
    checkpointing: float  # part of the layers that recompute their activations, 0 to 1
    host_gib: float = 0.0  # of the machine, for the layers that its GPUs share

    @property
    def resting_gib(self) -> float:
        """Sum everything but activations."""
        return sum(getattr(self, f"{item}_gib") for item in ITEMS)

    def peak_gib(self, tokens: int) -> float:
        """Return the peak with a micro-batch of so many tokens."""
        return self.resting_gib + self.shape.activation_bytes(tokens, self.checkpointing) / GIB

    def most_gib(self, tokens: int) -> float:
        """Return the highest peak of all micro-batches of up to so many tokens."""
        return self.resting_gib + self.shape.activation_bytes_at_most(tokens, self.checkpointing) / GIB

    def largest_micro_batch(self, gpu_gib: float, fraction: float = 0.9) -> int:
        """Return the tokens of the largest micro-batch within `fraction` of a GPU; 0 if nothing fits."""
        return self.shape.tokens_within((gpu_gib * fraction - self.resting_gib) * GIB, self.checkpointing)


def frozen_bytes(shape: ModelShape, load_in_4bit: bool) -> tuple[float, float]:
    """
    Return the bytes of the decoder layers that can be in one place, and those that every GPU holds.

    The latter are the embeddings, which stay in 16 bits, and the constants of 4-bit weights.
    """
    values = shape.stored_linear_values
    constants = values * _CONSTANTS_BYTES if load_in_4bit else 0.0
    return values * (budget.NF4_PACKED_BYTES if load_in_4bit else 2), constants + 2 * shape.embedding_values


def estimate(
    shape: ModelShape,
    load_in_4bit: bool = True,
    r: int = 16,
    optim: str = "adamw_8bit",
    checkpointing: float = True,
    num_gpus: int = 1,
    frozen_weights: str = "replicated",
) -> Estimate:
    """
    Estimate a LoRA fine-tune with Unsloth; raise `ValueError` for an optimizer that the Trainer does not know.

    Embeddings stay in 16 bits, and adapters of rank `r` are on all linear layers. `checkpointing` is Unsloth's, with
    offloading. With `frozen_weights="host"` the layers are in the memory of the machine, and a GPU holds a few at a time; with
    `"sharded"` each of the `num_gpus` GPUs, which are of one machine then, holds its part of them as well.
    """
    adapters, working_bytes = shape.lora_values(r), shape.working_bytes
    layer_bytes, other_bytes = frozen_bytes(shape, load_in_4bit)
    host_bytes = layer_bytes + other_bytes - 2 * shape.embedding_values if frozen_weights == "host" else 0.0
    if frozen_weights != "replicated":
        held_layers = FETCHED_LAYERS + (shape.layers / num_gpus if frozen_weights == "sharded" else 0)
        layer_bytes = held_layers * layer_bytes / shape.layers
    return Estimate(
        weights_gib=(layer_bytes + other_bytes) / GIB,
        adapters_gib=4 * adapters / GIB,
        gradients_gib=4 * adapters / GIB,
        optimizer_gib=state_bytes(optim) * adapters / GIB,
        reduction_gib=min(4 * adapters, REDUCTION_BYTES) / GIB if num_gpus > 1 else 0.0,
        workspace_gib=shape.workspace_bytes / GIB,
        context_gib=budget.CONTEXT_GIB,
        token_kib=(working_bytes + (1 - checkpointing) * shape.kept_bytes) / 1024,
        shape=shape,
        checkpointing=checkpointing,
        host_gib=host_bytes / GIB,
    )
