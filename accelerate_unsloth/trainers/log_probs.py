"""
TRL's fused LM head in plain PyTorch, for machines without GPUs.

`trl.SFTTrainer` computes its losses and metrics from per-token log-probabilities, through a Triton kernel that needs a
GPU (trl 1.15.0, `kernels/chunked_logprob.py`). This twin lets TRL's own loss run on a CPU. It builds the logits of all
labelled tokens at once, so it takes more memory than the kernel. Delete it when TRL has a CPU path of its own.
"""

import torch
import torch.nn.functional as F
import trl.trainer.utils

from ..patches import patch_log

_NAME = "_ChunkedLogProbFunction"


class LogProbs:
    """Has the one method of TRL's autograd function that its trainers call; PyTorch's own autograd does the rest."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Return per-token log-probabilities of `targets`, and what else `outputs` names, each of shape `(tokens,)`.

        `hidden` is of shape `(tokens, hidden)`, `weight` of shape `(vocabulary, hidden)`. `chunk_size` is not used.
        """
        logits = F.linear(hidden, weight.to(hidden.dtype), bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        every = logits.log_softmax(dim=-1)
        further = {
            "entropy": lambda: -(every.exp() * every).sum(dim=-1),
            "log_sum_sq_probs": lambda: (2 * every.detach()).logsumexp(dim=-1),
            "mean_logits": lambda: logits.detach().mean(dim=-1),
            "is_top1": lambda: logits.argmax(dim=-1) == targets,
        }
        log_probs = every.gather(-1, targets[:, None]).squeeze(-1)
        return log_probs, *(compute() if name in outputs else None for name, compute in further.items())


def install() -> None:
    """Let TRL use [`LogProbs`] in a process without a GPU."""
    if not torch.cuda.is_available() and not patch_log.holds(trl.trainer.utils, _NAME):
        patch_log.patch(trl.trainer.utils, _NAME, LogProbs)
