"""
The arithmetic of what fits: bytes of weights, adapters, optimizer state and activations, from a model's sizes alone.

The coefficients of the activations were fitted to peaks measured with Unsloth 2026.10.6 on H200s
(`benchmarks/step_cost.py`, `benchmarks/RESULTS.md`); the rest is counting. Nothing here touches a device, except
`read`, which says how much memory this process may use.
"""

import bisect
import functools
import math
from dataclasses import dataclass

GIB = 2**30

# bitsandbytes NF4 with double quantization: 4 bits a value, a float8 constant for each 64, a float32 for each 256 of them.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# Values that a layer keeps a token, in multiples of the hidden and of the intermediate size.
_WORKING = (10.3, 3.1)  # while one layer is being recomputed or run backward
_KEPT = (6.4, 2.0)  # from the forward to the backward, without checkpointing

# Unsloth's fused loss cuts its rows into one chunk, or a multiple of 4, so that 16 bytes a logit stay within 4 GiB
# (unsloth_zoo 2026.10.7, fused_losses/cross_entropy_loss.py); a chunk was seen to hold 4 bytes a logit, and each token some
# 11.5 a hidden value. With little memory left it takes smaller chunks, which is not counted here.
_LOSS_SCRATCH_BYTES, _PLANNED_LOGIT_BYTES, _LOGIT_BYTES, _STATE_BYTES = 4 * GIB, 16, 4, 11.5

# What PyTorch allocates for cuBLAS from Hopper on (CUDABlas.cpp, torch 2.11); less on older GPUs.
_CUBLAS_WORKSPACE_BYTES = 2**25

# A CUDA context and Triton's kernels; outside of what PyTorch counts.
CONTEXT_GIB = 0.8


@dataclass(frozen=True)
class ModelShape:
    """
    The sizes of a decoder-only model that memory and time follow from.

    Args:
        hidden (`int`): Width of the residual stream.
        intermediate (`int`): Width of the MLP that one token uses; with experts the sum over shared and active ones.
        layers (`int`): Number of layers.
        heads (`int`): Query heads.
        kv_heads (`int`): Key and value heads.
        head_dim (`int`): Width of a head.
        vocabulary (`int`): Words.
        tied (`bool`): Whether the output embedding is the input's.
        idle_values (`int`): Weights that are stored beyond those that a token passes: those of the other experts.
        idle_width (`int`): Inputs and outputs of their linear layers; LoRA adapters take this times their rank.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    idle_values: int = 0
    idle_width: int = 0

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer that a token passes, under the usual names."""
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
        """Weights of the linear layers that one token passes."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    @property
    def stored_linear_values(self) -> int:
        """Weights of all linear layers, of all experts."""
        return self.linear_values + self.idle_values

    @property
    def embedding_values(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def has_experts(self) -> bool:
        """Whether a token passes only a part of the weights; the activations of such layers were not measured."""
        return self.idle_values > 0

    @property
    def adapter_width(self) -> int:
        """Inputs and outputs of all linear layers, of all experts."""
        return self.layers * sum(map(sum, self.linear_shapes.values())) + self.idle_width

    def lora_values(self, r: int) -> int:
        """Trainable values of LoRA adapters of rank `r` on all linear layers, of all experts."""
        return r * self.adapter_width

    @property
    def attention_per_token(self) -> float:
        """
        Arithmetic of one token's attention to one other, over that of its linear layers.

        A token of a causal row of n looks at n / 2 others on average, at 4 x heads x head_dim operations each and a
        layer; its linear layers take 2 operations a weight. Attention kernels reach about half the rate of matmuls.
        """
        return 2 * self.layers * self.heads * self.head_dim / self.linear_values

    @property
    def kept_bytes(self) -> float:
        """Bytes a token that all layers keep for the backward, without checkpointing and in 16 bits."""
        return 2 * self.layers * (_KEPT[0] * self.hidden + _KEPT[1] * self.intermediate)

    @property
    def working_bytes(self) -> float:
        """Bytes a token while one layer runs backward, with what it recomputes."""
        return 2 * (_WORKING[0] * self.hidden + _WORKING[1] * self.intermediate)

    def activation_bytes(self, tokens: int, checkpointing: bool) -> float:
        """
        What a micro-batch adds at the peak of a step, in bytes: while a layer runs backward, or while the loss does.

        Args:
            tokens (`int`): Tokens of the micro-batch.
            checkpointing (`bool`): Whether activations are recomputed, and what is kept is offloaded.
        """
        chunks = tokens * self.vocabulary * _PLANNED_LOGIT_BYTES / _LOSS_SCRATCH_BYTES
        chunks = 1 if chunks <= 1 else 4 * math.ceil(chunks / 4)
        return self._with_loss(tokens, checkpointing, tokens * self.vocabulary * _LOGIT_BYTES / chunks)

    def activation_bytes_at_most(self, tokens: int, checkpointing: bool) -> float:
        """As [`ModelShape.activation_bytes`], for the micro-batch of up to so many tokens that takes the most."""
        most = _LOSS_SCRATCH_BYTES * _LOGIT_BYTES / _PLANNED_LOGIT_BYTES
        return self._with_loss(tokens, checkpointing, min(most, tokens * self.vocabulary * _LOGIT_BYTES))

    def _with_loss(self, tokens: int, checkpointing: bool, logit_bytes: float) -> float:
        loss = logit_bytes + tokens * _STATE_BYTES * self.hidden
        return max(tokens * self.working_bytes, loss) + (0 if checkpointing else tokens * self.kept_bytes)

    def tokens_within(self, left_bytes: float, checkpointing: bool) -> int:
        """The largest micro-batch that adds no more than `left_bytes`, nor does any smaller one."""
        most = max(0, int(left_bytes / self.working_bytes))
        needs = functools.partial(self.activation_bytes_at_most, checkpointing=checkpointing)
        return max(0, bisect.bisect_right(range(most + 1), left_bytes, key=needs) - 1)

    @property
    def workspace_bytes(self) -> int:
        """A weight taken out of 4 bits, and cuBLAS's workspace."""
        return 2 * self.hidden * max(self.intermediate, self.hidden) + _CUBLAS_WORKSPACE_BYTES


@dataclass(frozen=True)
class Reading:
    """What this process may use of its device: `limit_bytes` in all, of which it uses `used_bytes`."""

    limit_bytes: int
    used_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.limit_bytes - self.used_bytes


def read(device, fraction: float, processes: int = 1) -> Reading:
    """
    What PyTorch may still allocate here.

    Args:
        device (`torch.device`): A GPU or the CPU.
        fraction (`float`): Part of the device that may be used, CUDA context and other processes included.
        processes (`int`, *optional*, defaults to `1`): How many processes share a CPU's memory.
    """
    import psutil
    import torch

    if device.type != "cuda":
        used = psutil.Process().memory_info().rss
        free = int(psutil.virtual_memory().available * fraction / processes)
        return Reading(limit_bytes=used + free, used_bytes=used)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return Reading(limit_bytes=int(total * fraction) - others, used_bytes=torch.cuda.memory_allocated(device))


def tokens_that_fit(
    shape: ModelShape, left_bytes: float, trainable: int, gradient_bytes: int, optim_bytes: int, checkpointing: bool
) -> int:
    """
    The largest micro-batch, in tokens, beside everything that is loaded already.

    Args:
        shape ([`ModelShape`]): Sizes of the model.
        left_bytes (`float`): Memory that is left, with weights and adapters loaded and before the first step.
        trainable (`int`): Trainable values.
        gradient_bytes (`int`): Bytes of a gradient value.
        optim_bytes (`int`): Bytes of optimizer state a trainable value; see [`optimizer_bytes`].
        checkpointing (`bool`): Whether activations are recomputed, and what is kept is offloaded.

    Returns:
        `int`: 0 if not even the optimizer fits.
    """
    left = left_bytes - trainable * (gradient_bytes + optim_bytes) - shape.workspace_bytes
    return shape.tokens_within(left, checkpointing)
