"""
fp16 steps in which no parameter has a gradient, because every label of the effective batch is masked.

PyTorch's `GradScaler` then raises "No inf checks were recorded for this optimizer" (torch 2.11 to 2.14,
`amp/grad_scaler.py`), while an optimizer without a scaler does nothing. Delete this when the scaler does nothing too.
"""

import torch

from ..patches import PatchLog


def allow_steps_without_gradients(scaler: torch.amp.GradScaler) -> PatchLog:
    """Let the scaler of one optimizer skip steps in which no parameter has a gradient. Its scale stays, too."""
    unscale, step, update = scaler.unscale_, scaler.step, scaler.update
    stepped = True

    def unscale_those_with_gradients(optimizer):
        if _has_gradients(optimizer):
            unscale(optimizer)

    def step_those_with_gradients(optimizer, *args, **kwargs):
        nonlocal stepped
        stepped = _has_gradients(optimizer)
        return step(optimizer, *args, **kwargs) if stepped else optimizer.step(*args, **kwargs)

    def update_after_a_step(new_scale=None):
        if stepped:
            update(new_scale)

    patches = PatchLog()
    patches.patch(scaler, "unscale_", unscale_those_with_gradients)
    patches.patch(scaler, "step", step_those_with_gradients)
    patches.patch(scaler, "update", update_after_a_step)
    return patches


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
