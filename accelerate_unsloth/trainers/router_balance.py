"""
The load-balancing loss of a mixture of experts, over the whole effective batch.

For E experts it is `E * sum_e f_e * p_e`, where `f_e` is the part of all assignments that expert e gets and `p_e` its mean
routing probability (Switch Transformer, https://huggingface.co/papers/2101.03961, equations 4 to 6; transformers adds up
all layers before it multiplies). It is not additive: computed per micro-batch, as transformers and TRL do, it depends on
how a step is split. Exact here means: equal to TRL in one process with the whole effective batch as one micro-batch.

Gradients flow through `p_e` alone, which is additive once `f_e` of the whole step is known. So each rank first runs its
micro-batches without gradients, and one all-reduce of 2E + 2 numbers adds up the assignments of all ranks. Then each
micro-batch contributes its share of `p_e`. The price is one more forward per micro-batch, also where a step has only one,
because it may have to be split.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import CellType, FunctionType
from typing import Any

import torch

from ..patches import PatchLog
from ..reduction import sum_over_ranks

# Where transformers (5.17) and the code that Unsloth (2026.10.9) generates from it compute the loss, and where the latter
# scales it by the tokens of a micro-batch.
_LOSS, _SCALE = "load_balancing_loss_func", "unsloth_ga_scale_aux_loss"


@dataclass
class Sums:
    """Over all layers: assignments and routing probabilities of each expert, of shape `(experts,)`, and rows."""

    assigned: torch.Tensor
    probability: torch.Tensor
    rows: torch.Tensor

    def loss_with(self, assigned: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the share of the loss that these probabilities have, with the assignments and rows of a whole step."""
        return len(assigned) * ((assigned / rows) * (self.probability / rows)).sum()


def router_sums(gate_logits: Iterable[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None) -> Sums:
    """
    Add up what the routers of a micro-batch decided.

    Args:
        gate_logits (`Iterable[torch.Tensor]`): Of each layer, of shape `(rows * tokens, experts)`.
        top_k (`int`): Experts per token.
        attention_mask (`torch.Tensor` of shape `(rows, tokens)`, *optional*): Zero for padding, which does not count.
    """
    total = None
    for logits in gate_logits:
        probabilities = logits.softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        counts = torch.ones(len(logits), device=logits.device)
        if attention_mask is not None:
            counts = attention_mask.reshape(-1).to(counts)
        assigned = torch.zeros(logits.shape[-1], device=logits.device)
        assigned.index_add_(0, chosen.reshape(-1), counts.repeat_interleave(top_k))
        layer = (assigned, (probabilities.float() * counts[:, None]).sum(dim=0), counts.sum())
        total = layer if total is None else tuple(one + other for one, other in zip(total, layer, strict=True))
    return Sums(*total)


def _globals_of_forwards(model: torch.nn.Module) -> Iterator[dict]:
    """
    Yield the global names that the forwards of a model see.

    They need not be those of a module: Unsloth runs forwards that it has rewritten in namespaces of their own, and wraps
    others.
    """
    forwards = [type(module).forward for module in model.modules()] + [module.forward for module in model.modules()]
    pending, seen = [getattr(forward, "__func__", forward) for forward in forwards], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        yield function.__globals__
        pending += [getattr(function, "__wrapped__", None), *map(_content, function.__closure__ or ())]


def _content(cell: CellType) -> Any:
    try:
        return getattr(cell.cell_contents, "__func__", cell.cell_contents)
    except ValueError:  # not filled yet
        return None


class RouterBalance:
    """
    Gives each micro-batch its share of the balancing loss of the whole step.

    While it is [`installed`] for a model, the balancing loss of that model goes through it.

    Attributes:
        values (`list[float]`): The loss of each step, before its coefficient; whoever logs them takes them away.
    """

    def __init__(self, config):
        text = config.get_text_config()
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        self._experts = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
        self.values: list[float] = []
        self._counted: list[Sums] | None = None  # while micro-batches are counted
        self._step: Sums | None = None  # of all ranks, once they are
        self._items = self._weight = 1.0

    @contextmanager
    def installed(self, model: torch.nn.Module) -> Iterator[None]:
        """Take the place of transformers' function wherever the forwards of `model` may find it."""
        # TRL takes it from there, at its first use.
        mixtral = vars(import_module("transformers.models.mixtral.modeling_mixtral"))
        found = {id(names): names for names in [mixtral, *_globals_of_forwards(model)]}
        self.values, self._step = [], None
        patches = PatchLog()
        for names in found.values():
            if callable(original := names.get(_LOSS)):
                patches.patch(names, _LOSS, partial(self._loss, original))
            if callable(names.get(_SCALE)):
                patches.patch(names, _SCALE, lambda aux_loss, *args, **kwargs: aux_loss)
        try:
            yield
        finally:
            patches.undo()

    @torch.no_grad()
    def count(self, forwards: Iterable[Callable[[], None]], items: torch.Tensor) -> None:
        """
        Run a step's micro-batches without gradients, and add up the assignments of all ranks; all come here together.

        Each of `forwards` runs the model on one micro-batch of this rank. `items` are the loss items of this rank in the step.
        Raise `ValueError` if the model computed no balancing loss on any rank.
        """
        totals = torch.zeros(2 * self._experts + 2, device=items.device, dtype=torch.float64)
        totals[-1] = items
        self._counted = []
        try:
            for forward in forwards:
                forward()
            for sums in self._counted:
                totals[:-1] += torch.cat([sums.assigned, sums.probability, sums.rows[None]])
        finally:
            self._counted = None
        sum_over_ranks(totals)
        assigned, probability = totals[:-2].float().split(self._experts)
        rows, self._items = totals[-2:].float()
        if not rows:
            if self._items:
                raise ValueError(_NO_LOSS)
            return  # no rank has anything to learn from in this step
        self._step = Sums(assigned, probability, rows)
        self.values.append(float(self._step.loss_with(assigned, rows)))

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Let the loss be zero."""
        self._counted = []
        try:
            yield
        finally:
            self._counted = None

    @contextmanager
    def weighing(self, items: torch.Tensor | float) -> Iterator[None]:
        """
        Train on a micro-batch whose loss is divided by `items` on its way into the rank's mean, which the share is not to be.
        """
        self._weight = 1.0 if self._step is None else self._items / items
        try:
            yield
        finally:
            self._weight = 1.0

    def end_step(self) -> None:
        """Forget the counts of the step."""
        self._step = None

    @torch.compiler.disable
    def _loss(self, original, gate_logits, num_experts=None, top_k=2, attention_mask=None):
        if not isinstance(gate_logits, tuple) or not gate_logits:
            return original(gate_logits, num_experts, top_k, attention_mask)
        if self._counted is not None:
            self._counted.append(router_sums(gate_logits, top_k, attention_mask))
            return gate_logits[0].new_zeros(())
        if self._step is None or not torch.is_grad_enabled():  # the probe, or an evaluation
            return original(gate_logits, num_experts, top_k, attention_mask)
        sums = router_sums(gate_logits, top_k, attention_mask)
        value = sums.loss_with(self._step.assigned, self._step.rows) * self._weight
        if not value.requires_grad:
            raise ValueError(_NO_GRADIENT)
        return value


_NO_LOSS = (
    "The load-balancing loss of the experts is switched on (router_aux_loss_coef, or the model's own configuration), but "
    "the model computed none. Set router_aux_loss_coef=0.0."
)
# Unsloth's checkpointing, for one, runs the layers without gradients, and their routers' logits with them.
_NO_GRADIENT = (
    "The load-balancing loss of the experts has no gradient: activation checkpointing recomputes the routers, or nothing "
    "below them is trained. Set gradient_checkpointing='none' in UnslothPlugin, or router_aux_loss_coef=0.0."
)
