"""
The arithmetic of what fits: bytes of weights, adapters and activations, from a model's sizes alone.

The coefficients of the activations were fitted to peaks measured with Unsloth 2026.10.6 on H200s
(`benchmarks/step_cost.py`, `benchmarks/RESULTS.md`); the rest is counting. Only `read` uses a GPU.
"""

import bisect
import functools
import math
from dataclasses import dataclass

GIB = 2**30

# bitsandbytes NF4, double quantization: 4 bits per value, a float8 constant per 64, and a float32 per 256 constants.
NF4_PACKED_BYTES = 0.5
NF4_BYTES = NF4_PACKED_BYTES + 1 / 64 + 4 / (64 * 256)

# Values that a layer keeps per token, in multiples of the hidden and of the intermediate size.
_WORKING = (10.3, 3.1)  # while one layer is being recomputed or run backward
_KEPT = (6.4, 2.0)  # from the forward to the backward, without checkpointing

# Unsloth's fused loss splits its rows into one chunk or a multiple of 4, so that 16 bytes per logit stay within 4 GiB
# (unsloth_zoo 2026.10.7, fused_losses/cross_entropy_loss.py). Measured: a chunk holds 4 bytes per logit, and each
# token about 11.5 bytes per hidden value. With little memory left the chunks are smaller, which is not counted here.
_LOSS_SCRATCH_BYTES, _PLANNED_LOGIT_BYTES, _LOGIT_BYTES, _STATE_BYTES = 4 * GIB, 16, 4, 11.5

# What PyTorch allocates for cuBLAS from Hopper on (CUDABlas.cpp, torch 2.11); less on older GPUs.
_CUBLAS_WORKSPACE_BYTES = 2**25

# A CUDA context and Triton's kernels; outside of what PyTorch counts.
CONTEXT_GIB = 0.8


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model that determine memory and time."""

    hidden: int  # width of the residual stream
    intermediate: int  # width of the MLP that one token uses; with experts the sum over shared and active ones
    layers: int
    heads: int  # of queries
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # whether input and output embedding are the same
    idle_values: int = 0  # weights of the experts that a token does not use
    idle_width: int = 0  # inputs and outputs of their linear layers; LoRA adapters take this times their rank

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return inputs and outputs of each linear layer that a token uses, under the usual names."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_values(self) -> int:
        """Count the weights of the linear layers that one token uses."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    @property
    def stored_linear_values(self) -> int:
        """Count the weights of all linear layers, of all experts."""
        return self.linear_values + self.idle_values

    @property
    def embedding_values(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def has_experts(self) -> bool:
        """Return whether a token uses only a part of the weights; activations of such layers were not measured."""
        return self.idle_values > 0

    @property
    def adapter_width(self) -> int:
        """Sum inputs and outputs of all linear layers, of all experts."""
        return self.layers * sum(map(sum, self.linear_shapes.values())) + self.idle_width

    def lora_values(self, r: int) -> int:
        """Count the values of LoRA adapters of rank `r` on all linear layers, of all experts."""
        return r * self.adapter_width

    @property
    def attention_per_token(self) -> float:
        """
        Return the cost of one token's attention to one other token, in units of a token's linear layers.

        A token of a causal row of n attends to n / 2 others on average, at 4 x heads x head_dim operations per pair
        and layer; linear layers take 2 operations per weight. Attention kernels reach about half the rate of matmuls.
        """
        return 2 * self.layers * self.heads * self.head_dim / self.linear_values

    @property
    def kept_bytes(self) -> float:
        """Return the bytes per token that all layers keep for the backward, without checkpointing and in 16 bits."""
        return 2 * self.layers * (_KEPT[0] * self.hidden + _KEPT[1] * self.intermediate)

    @property
    def working_bytes(self) -> float:
        """Return the bytes per token while one layer runs backward, with what it recomputes."""
        return 2 * (_WORKING[0] * self.hidden + _WORKING[1] * self.intermediate)

    def activation_bytes(self, tokens: int, recomputed: float) -> float:
        """
        Return the bytes that a micro-batch adds at the peak of a step: in the backward of a layer, or in the loss.

        `recomputed` is the part of the layers, 0 to 1, that recompute their activations and offload what they keep.
        """
        chunks = tokens * self.vocabulary * _PLANNED_LOGIT_BYTES / _LOSS_SCRATCH_BYTES
        chunks = 1 if chunks <= 1 else 4 * math.ceil(chunks / 4)
        return self._with_loss(tokens, recomputed, tokens * self.vocabulary * _LOGIT_BYTES / chunks)

    def activation_bytes_at_most(self, tokens: int, recomputed: float) -> float:
        """Return the largest [`ModelShape.activation_bytes`] of all micro-batches of up to so many tokens."""
        most = _LOSS_SCRATCH_BYTES * _LOGIT_BYTES / _PLANNED_LOGIT_BYTES
        return self._with_loss(tokens, recomputed, min(most, tokens * self.vocabulary * _LOGIT_BYTES))

    def _with_loss(self, tokens: int, recomputed: float, logit_bytes: float) -> float:
        loss = logit_bytes + tokens * _STATE_BYTES * self.hidden
        return max(tokens * self.working_bytes, loss) + (1 - recomputed) * tokens * self.kept_bytes

    def tokens_within(self, left_bytes: float, recomputed: float) -> int:
        """Return the tokens up to which every micro-batch adds at most `left_bytes`."""
        most = max(0, int(left_bytes / self.working_bytes))
        needs = functools.partial(self.activation_bytes_at_most, recomputed=recomputed)
        return max(0, bisect.bisect_right(range(most + 1), left_bytes, key=needs) - 1)

    @property
    def workspace_bytes(self) -> int:
        """Return the bytes of one dequantized weight and of cuBLAS's workspace."""
        return 2 * self.hidden * max(self.intermediate, self.hidden) + _CUBLAS_WORKSPACE_BYTES


@dataclass(frozen=True)
class Reading:
    """Memory that this process may use of its GPU, and what it uses already."""

    limit_bytes: int
    used_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.limit_bytes - self.used_bytes


def read(device, fraction: float) -> Reading:
    """
    Read how much memory PyTorch may use: `fraction` of what other processes leave of the GPU.

    A limit that was set with `torch.cuda.set_per_process_memory_fraction` counts as the size of the GPU.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device)
    return Reading(
        limit_bytes=int(fraction * min(total - others, allowed)), used_bytes=torch.cuda.memory_allocated(device)
    )


def tokens_that_fit(
    shape: ModelShape, left_bytes: float, trainable: int, gradient_bytes: int, optim_bytes: int, recomputed: float
) -> int:
    """
    Return the tokens of the largest micro-batch that fits; 0 if not even the optimizer does.

    Args:
        shape ([`ModelShape`]): Sizes of the model.
        left_bytes (`float`): Memory that is left, with weights and adapters loaded and before the first step.
        trainable (`int`): Number of trainable values.
        gradient_bytes (`int`): Bytes of a gradient per trainable value.
        optim_bytes (`int`): Bytes of optimizer state per trainable value; see [`~optimizer_state.state_bytes`].
        recomputed (`float`): Part of the layers, 0 to 1, that recompute their activations and offload what they keep.
    """
    left = left_bytes - trainable * (gradient_bytes + optim_bytes) - shape.workspace_bytes
    return shape.tokens_within(left, recomputed)
