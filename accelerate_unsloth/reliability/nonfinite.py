"""What a loss or a gradient that is not finite does, on whichever rank it appears."""

from collections.abc import Iterable

from ..launch.channel import channel


def handle(
    ranks: list[int], step: int, samples: list, on_nonfinite: str, parameters: Iterable, scaled: bool
) -> str | None:
    """
    End the run, or skip the step on all ranks by removing the gradients; all ranks come here together.

    `ranks` are those whose numbers are not finite, the same list on every rank. Where gradients are `scaled`, the
    GradScaler skips the step by itself, and has to see them for it. Return what happened, for rank 0 to print, or `None`.

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
