"""
The one all-reduce of an optimizer step: gradients, loss and token counts of all ranks in one flat buffer.

Each rank brings the gradient of its own mean loss and the number of tokens behind it. The reduced gradient is that of
the mean over all tokens of all ranks, as one process would have computed it on the whole effective batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know after the reduction of a step, the same on each of them."""

    loss: torch.Tensor  # mean over all loss items, a scalar
    items: torch.Tensor  # loss items of all ranks, a scalar
    tokens: torch.Tensor  # tokens of all ranks, a scalar
    stop_votes: int  # ranks that were asked to stop
    ranks_out_of_memory: int  # ranks that had to cut a micro-batch
    nonfinite_ranks: list[int]  # ranks whose loss or gradient was not finite


class LocalReducer:
    """
    What [`FlatReducer`] is to several ranks, for one: its gradient is the mean already, so nothing is sent.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): The trainable parameters.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._parameters = _trainable(parameters)

    @torch.no_grad()
    def reduce(
        self,
        loss: torch.Tensor,
        num_items: torch.Tensor,
        num_tokens: torch.Tensor,
        wants_stop: bool = False,
        check_gradients: bool = True,
    ) -> StepTotals:
        """As [`FlatReducer.reduce`]."""
        gradients = [p.grad for p in self._parameters if p.grad is not None] if check_gradients else []
        return StepTotals(
            loss=loss.double(),
            items=num_items,
            tokens=num_tokens,
            stop_votes=int(wants_stop),
            ranks_out_of_memory=0,
            nonfinite_ranks=[] if not num_items or are_finite(loss, gradients) else [0],
        )

    def broadcast_parameters(self) -> None:
        """Nothing to do."""


class FlatReducer:
    """
    Reduces the gradients of `parameters` over all ranks, weighted by each rank's number of loss items.

    The buffer is float32 (float64 if a parameter is), whatever the gradients are, and lives as long as the reducer:
    4 bytes a trainable value. A parameter without gradient on this rank counts as zero; without gradient on every
    rank it keeps none, so that an optimizer's weight decay passes it over as it would in one process.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`):
            The trainable parameters, in the same order on every rank and all on one device.

    Raises:
        ValueError: if no parameter is trainable.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._parameters = _trainable(parameters)
        first = self._parameters[0]
        double = any(p.dtype == torch.float64 for p in self._parameters)
        self._sizes = [p.numel() for p in self._parameters]
        # Behind the gradients: a presence flag for each parameter, the totals of the step, two votes (to stop, and
        # for smaller micro-batches), and for each rank whether its numbers went bad.
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        self._layout = [sum(self._sizes), len(self._sizes), 3, 2, world_size]
        self._buffer = torch.zeros(
            sum(self._layout),
            dtype=torch.float64 if double else torch.float32,
            device=first.device,
        )
        flat = self._buffer[: self._layout[0]].split(self._sizes)
        self._views = [view.view_as(p) for view, p in zip(flat, self._parameters, strict=True)]

    @torch.no_grad()
    def reduce(
        self,
        loss: torch.Tensor,
        num_items: torch.Tensor,
        num_tokens: torch.Tensor,
        wants_stop: bool = False,
        ran_out_of_memory: bool = False,
        check_gradients: bool = True,
    ) -> StepTotals:
        """
        Replace each parameter's gradient by the mean over all loss items of all ranks.

        Args:
            loss (`torch.Tensor`): This rank's mean loss over its items in this step, a scalar.
            num_items (`torch.Tensor`): Number of loss items behind it, a scalar; 0 if the rank had none.
            num_tokens (`torch.Tensor`): Tokens this rank processed, a scalar.
            wants_stop (`bool`, *optional*, defaults to `False`): Whether this rank was asked to stop.
            ran_out_of_memory (`bool`, *optional*, defaults to `False`):
                Whether this rank had to cut a micro-batch in this step.
            check_gradients (`bool`, *optional*, defaults to `True`):
                Whether gradients have to be finite; a GradScaler finds and skips those that are not by itself.

        Returns:
            [`StepTotals`]
        """
        values, flags, totals, votes, bad = self._buffer.split(self._layout)
        present = [p.grad is not None for p in self._parameters]
        if all(present):
            flags.fill_(1.0)
        else:
            values.zero_()
            flags.copy_(torch.tensor(present, dtype=flags.dtype))
        views = [view for view, has in zip(self._views, present, strict=True) if has]
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients:
            torch._foreach_copy_(views, gradients)
        totals.copy_(torch.stack([loss.double() * num_items, num_items, num_tokens]))
        votes[0], votes[1] = float(wants_stop), float(ran_out_of_memory)
        finite = torch.isfinite(loss)
        if check_gradients:
            finite = finite & torch.isfinite(values).all()
        bad.zero_()
        bad[self._rank] = ~finite & (totals[1] > 0)
        values.mul_(totals[1])
        # A rank without items has nothing to say, even where its gradient is not a number.
        values.masked_fill_(totals[1] == 0, 0.0)
        totals[0].masked_fill_(totals[1] == 0, 0.0)
        dist.all_reduce(self._buffer)
        weight = totals[1].clamp(min=1.0)
        values.div_(weight)
        if gradients:
            torch._foreach_copy_(gradients, views)
        if not all(present):
            self._add_missing_gradients(present, flags)
        stop_votes, ranks_out_of_memory, *bad_ranks = torch.cat([votes, bad]).tolist()
        return StepTotals(
            loss=totals[0] / weight,
            items=totals[1].clone(),
            tokens=totals[2].clone(),
            stop_votes=int(stop_votes),
            ranks_out_of_memory=int(ranks_out_of_memory),
            nonfinite_ranks=[rank for rank, count in enumerate(bad_ranks) if count],
        )

    def _add_missing_gradients(self, present: list[bool], flags: torch.Tensor) -> None:
        for parameter, view, has, ranks_with in zip(
            self._parameters, self._views, present, flags.tolist(), strict=True
        ):
            if not has and ranks_with > 0:
                parameter.grad = view.to(parameter.dtype, copy=True)

    @torch.no_grad()
    def broadcast_parameters(self) -> None:
        """Give every rank the trainable weights of rank 0, bit for bit."""
        broadcast(self._parameters)


@torch.no_grad()
def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """
    Give every rank the tensors of rank 0, bit for bit, in one message a type.

    Args:
        tensors (`Iterable[torch.Tensor]`): In the same order on every rank, on one device.
    """
    tensors = list(tensors)
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        dist.broadcast(flat, src=0)
        parts = flat.split([tensor.numel() for tensor in same])
        torch._foreach_copy_(same, [part.view_as(tensor) for part, tensor in zip(parts, same, strict=True)])


def are_finite(loss: torch.Tensor, gradients: list[torch.Tensor]) -> bool:
    """Whether a loss and gradients, of which there may be none, are all finite: by one number a gradient."""
    finite = torch.isfinite(loss)
    if gradients:
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        finite = finite & torch.isfinite(norms).all()
    return bool(finite)


def _trainable(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("No parameter is trainable. Add adapters with get_peft_model, or set full_finetuning=True.")
    return trainable
