"""
Who builds the model: Unsloth on a GPU, transformers and PEFT elsewhere.

Unsloth has to be imported before trl, transformers and peft, so the choice is made once, when `engines.select` is
imported. Importing this package chooses nothing and costs nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineChoice:
    name: str  # "unsloth" | "reference"
    reason: str  # one clause, shown in the start-up table


def resolve(requested: str, visible_gpus: int, use_cpu: bool) -> EngineChoice:
    """Choose the engine; raise `ValueError` if Unsloth is requested where it cannot run."""
    if requested == "unsloth":
        if use_cpu or visible_gpus == 0:
            where = "this launch uses the CPU" if visible_gpus else "no GPU is visible to this process"
            raise ValueError(
                f"engine='unsloth' was requested, but {where}, and Unsloth's kernels need one. Use a GPU, or leave "
                "ACCELERATE_UNSLOTH_ENGINE at 'auto' for transformers and PEFT."
            )
        return EngineChoice("unsloth", "requested")
    if requested == "reference":
        return EngineChoice("reference", "requested")
    if visible_gpus == 0:
        return EngineChoice("reference", "no GPU is visible, and Unsloth's kernels need one")
    if use_cpu:
        return EngineChoice("reference", "the launch uses the CPU, where Unsloth's kernels cannot run")
    return EngineChoice("unsloth", f"{visible_gpus} GPU(s) visible")
