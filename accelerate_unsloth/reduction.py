"""
The one reduction of an optimizer step: gradients, loss and token counts of all ranks.

Each rank brings the gradient of its own mean loss and the number of items (tokens, rows, pairs) behind it. With n_r items
and gradient g_r on rank r, the reduced gradient is sum_r(n_r * g_r) / sum_r(n_r): that of the mean over all items of all
ranks, as one process would have computed it on the whole effective batch.

It runs after the last backward, so nothing that happens inside a forward or backward on one rank alone can break or hang
the others. The price is that the communication is not hidden behind the backward. Gradients travel in float32 chunks of
64 MiB, two of which exist at a time, so the memory does not grow with the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

# Large enough for the full bandwidth of NVLink and PCIe, and small beside any model that is trained as a whole.
CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know after the reduction of a step, the same on each of them."""

    loss: torch.Tensor  # mean over all loss items, a scalar
    items: torch.Tensor  # loss items of all ranks, a scalar
    tokens: torch.Tensor  # tokens of all ranks, a scalar
    stop_votes: int  # ranks that were asked to stop
    ranks_out_of_memory: int  # ranks on which a micro-batch did not fit
    nonfinite_ranks: list[int]  # ranks whose loss or gradient was not finite


class Reducer(Protocol):
    """Turns the gradients of all ranks into one, whether there are several ranks or one."""

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
        Replace each parameter's gradient by that of the mean over all loss items of all ranks.

        Args:
            loss (`torch.Tensor`): This rank's mean loss over its items in this step, a scalar.
            num_items (`torch.Tensor`): Number of loss items behind it, a scalar; 0 if the rank had none.
            num_tokens (`torch.Tensor`): Tokens this rank processed, a scalar.
            wants_stop (`bool`, *optional*, defaults to `False`): Whether this rank was asked to stop.
            ran_out_of_memory (`bool`, *optional*, defaults to `False`):
                Whether a micro-batch of this step did not fit on this rank.
            check_gradients (`bool`, *optional*, defaults to `True`):
                Whether gradients have to be finite; a GradScaler finds and skips those that are not by itself.

        Returns:
            [`StepTotals`]
        """

    def broadcast_parameters(self) -> None:
        """Give every rank the trainable weights of rank 0, bit for bit."""


def make_reducer(parameters: Iterable[torch.nn.Parameter], world_size: int) -> Reducer:
    """
    Return the reducer for a number of processes; raise `ValueError` if no parameter is trainable.

    Parameters are in the same order on every rank and all on one device. Those that are not trainable are left out.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("No parameter is trainable. Add adapters with get_peft_model, or set full_finetuning=True.")
    return LocalReducer(trainable) if world_size == 1 else ChunkedReducer(trainable)


class LocalReducer:
    """The [`Reducer`] of one process: its gradient is the mean already, so nothing is sent."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self._parameters = parameters

    @torch.no_grad()
    def reduce(
        self, loss, num_items, num_tokens, wants_stop=False, ran_out_of_memory=False, check_gradients=True
    ) -> StepTotals:
        gradients = [p.grad for p in self._parameters if p.grad is not None] if check_gradients else []
        return StepTotals(
            loss=loss.double(),
            items=num_items,
            tokens=num_tokens,
            stop_votes=int(wants_stop),
            ranks_out_of_memory=int(ran_out_of_memory),
            nonfinite_ranks=[0] if num_items and not _all_finite(loss, gradients) else [],
        )

    def broadcast_parameters(self) -> None:
        pass


@dataclass(frozen=True)
class _Piece:
    """Values `start` to `end` of a flattened parameter."""

    parameter: int
    start: int
    end: int


class ChunkedReducer:
    """
    The [`Reducer`] of several processes.

    A parameter without gradient on this rank counts as zero. One without gradient on every rank keeps none, so that an
    optimizer's weight decay skips it as it would in one process. The largest message has `chunk_bytes`.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], chunk_bytes: int = CHUNK_BYTES):
        self._parameters = parameters
        double = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if double else torch.float32
        self._chunks = _cut([p.numel() for p in parameters], max(1, chunk_bytes // self._dtype.itemsize))
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def reduce(
        self, loss, num_items, num_tokens, wants_stop=False, ran_out_of_memory=False, check_gradients=True
    ) -> StepTotals:
        missing = [p for p in self._parameters if p.grad is None]
        present = torch.tensor([p.grad is not None for p in self._parameters])
        finite = _all_finite(loss, [p.grad for p in self._parameters if check_gradients and p.grad is not None])
        # Three totals, two votes, for each rank whether its numbers are not finite, for each parameter its gradients.
        layout = [3, 2, self._world_size, len(self._parameters)]
        header = torch.zeros(sum(layout), dtype=torch.float64, device=loss.device)
        totals, votes, nonfinite, gradients = header.split(layout)
        totals.copy_(torch.stack([loss.double() * num_items, num_items.double(), num_tokens.double()]))
        totals[0].masked_fill_(totals[1] == 0, 0.0)
        votes.copy_(torch.tensor([float(wants_stop), float(ran_out_of_memory)]))
        nonfinite[self._rank] = ~finite & (totals[1] > 0)
        gradients.copy_(present)
        own_items = totals[1].clone()
        dist.all_reduce(header)
        items = totals[1].clamp(min=1.0)
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        self._reduce_gradients(own_items, items)
        stop_votes, ranks_out_of_memory, *flags = torch.cat([votes, nonfinite, gradients]).tolist()
        on_no_rank = [count == 0 for count in flags[self._world_size :]]
        for parameter, absent in zip(self._parameters, on_no_rank, strict=True):
            if absent:
                parameter.grad = None
        return StepTotals(
            loss=totals[0] / items,
            items=totals[1].clone(),
            tokens=totals[2].clone(),
            stop_votes=int(stop_votes),
            ranks_out_of_memory=int(ranks_out_of_memory),
            nonfinite_ranks=[rank for rank, flag in enumerate(flags[: self._world_size]) if flag],
        )

    def _reduce_gradients(self, own_items: torch.Tensor, items: torch.Tensor) -> None:
        """Replace each gradient by its mean over `items`; while one chunk travels, the next one is made."""
        if not all(p.grad.is_contiguous() for p in self._parameters):
            for parameter in self._parameters:
                parameter.grad = parameter.grad.contiguous()
        flat = [p.grad.view(-1) for p in self._parameters]
        travelling = None
        for chunk in self._chunks:
            slices = [flat[piece.parameter][piece.start : piece.end] for piece in chunk]
            buffer = torch.empty(sum(map(len, slices)), dtype=self._dtype, device=own_items.device)
            views = buffer.split([len(piece) for piece in slices])
            torch._foreach_copy_(list(views), slices)
            buffer.mul_(own_items)
            # A rank without items adds nothing, even where its gradient is not a number.
            buffer.masked_fill_(own_items == 0, 0.0)
            work = dist.all_reduce(buffer, async_op=True)
            if travelling is not None:
                _arrive(*travelling, items)
            travelling = work, buffer, views, slices
        if travelling is not None:
            _arrive(*travelling, items)

    def broadcast_parameters(self) -> None:
        broadcast(self._parameters)


def _arrive(work, buffer: torch.Tensor, views, slices: list[torch.Tensor], items: torch.Tensor) -> None:
    """Wait for a chunk, and write its mean into the gradients that it was made of."""
    work.wait()
    buffer.div_(items)
    torch._foreach_copy_(slices, list(views))


def _cut(sizes: list[int], most: int) -> list[list[_Piece]]:
    """
    Cut parameters of these sizes, one after the other, into chunks of at most `most` values.

    Example:

    ```python
    >>> from accelerate_unsloth.reduction import _cut
    >>> [[(piece.parameter, piece.start, piece.end) for piece in chunk] for chunk in _cut([3, 4], most=5)]
    [[(0, 0, 3), (1, 0, 2)], [(1, 2, 4)]]
    ```
    """
    chunks, room = [], 0
    for parameter, size in enumerate(sizes):
        start = 0
        while start < size:
            if not room:
                chunks.append([])
                room = most
            end = min(size, start + room)
            chunks[-1].append(_Piece(parameter, start, end))
            start, room = end, room - (end - start)
    return chunks


@torch.no_grad()
def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """
    Give every rank the tensors of rank 0, bit for bit, in chunks of at most 64 MiB of one dtype.

    They are in the same order on every rank, and on one device.
    """
    tensors = [tensor.detach() for tensor in tensors]
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = [tensor.contiguous().view(-1) for tensor in same]
        for chunk in _cut([len(values) for values in flat], max(1, CHUNK_BYTES // dtype.itemsize)):
            slices = [flat[piece.parameter][piece.start : piece.end] for piece in chunk]
            buffer = torch.cat(slices)
            dist.broadcast(buffer, src=0)
            torch._foreach_copy_(slices, list(buffer.split([len(piece) for piece in slices])))
        for tensor, values in zip(same, flat, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(values.view_as(tensor))


def sum_over_ranks(totals: torch.Tensor) -> torch.Tensor:
    """Add up a small tensor of all ranks, in place, where there are several; all ranks come here together."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals


def _all_finite(loss: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return on the device whether a loss and gradients, of which there may be none, are finite, by the largest of each."""
    finite = torch.isfinite(loss)
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if gradients:
        largest = torch.stack([norm.double() for norm in torch._foreach_norm(gradients, float("inf"))])
        finite = finite & torch.isfinite(largest).all()
    return finite
