"""Handles a loss or gradient that is not finite, on whichever rank it appears."""

from collections.abc import Iterable

from ..launch.channel import channel


def handle(
    ranks: list[int], step: int, samples: list, on_nonfinite: str, parameters: Iterable, scaled: bool
) -> str | None:
    """
    End the run, or skip the step on all ranks, which call it together.

    Args:
        ranks (`list[int]`): Ranks whose loss or gradients are not finite, the same list on every rank.
        step (`int`): Index of the step, from 1.
        samples (`list`): Samples of this rank in the step.
        on_nonfinite (`str`): The plugin's option: `"stop"` or `"skip"`.
        parameters (`Iterable[torch.nn.Parameter]`): Parameters, whose gradients are removed to skip the step.
        scaled (`bool`): Whether a GradScaler skips the step by itself, for which it needs the gradients.

    Returns:
        `str`: what happened, for rank 0 to print, or `None` if all is finite.

    Raises:
        FloatingPointError: under `"stop"`, naming ranks and samples.
    """
    if not ranks:
        return None
    found = channel().gather("samples", samples)
    where = "; ".join(f"rank {rank}{f' (samples {found[rank]})' if found[rank] else ''}" for rank in ranks)
    message = f"The loss or a gradient of step {step} is not finite on {where}."
    if on_nonfinite == "stop":
        raise FloatingPointError(
            f"{message} Look at these samples, lower the learning rate, or set on_nonfinite='skip' to skip such steps."
        )
    if not scaled:
        for parameter in parameters:
            parameter.grad = None
    return f"{message} The step is skipped on all ranks."
