"""
Who builds the model: Unsloth on a GPU, transformers and PEFT elsewhere.

The choice is made once, when the library is first used, because Unsloth has to be imported before trl, transformers
and peft. `engines.loaded` is the import that makes it.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineChoice:
    name: str  # "unsloth" | "reference"
    reason: str  # one clause, shown in the start-up table


def resolve(requested: str, visible_gpus: int, use_cpu: bool) -> EngineChoice:
    """
    Choose the engine.

    Args:
        requested (`str`): `"auto"`, `"unsloth"` or `"reference"`.
        visible_gpus (`int`): GPUs that this process can see.
        use_cpu (`bool`): Whether the launcher was told to stay on the CPU.

    Raises:
        ValueError: if Unsloth is asked for where it cannot run.

    Example:

    ```python
    >>> from accelerate_unsloth.engines import resolve
    >>> resolve("auto", visible_gpus=0, use_cpu=False).name
    'reference'
    ```
    """
    if requested == "unsloth":
        if use_cpu or visible_gpus == 0:
            where = "this launch was told to use the CPU" if visible_gpus else "no GPU is visible to this process"
            raise ValueError(
                f"engine='unsloth' was asked for, but {where}, and Unsloth's kernels need one. Use a GPU, or leave "
                "ACCELERATE_UNSLOTH_ENGINE at 'auto' for transformers and PEFT."
            )
        return EngineChoice("unsloth", "asked for")
    if requested == "reference":
        return EngineChoice("reference", "asked for")
    if visible_gpus == 0:
        return EngineChoice("reference", "no GPU is visible, and Unsloth's kernels need one")
    if use_cpu:
        return EngineChoice("reference", "the launch uses the CPU, where Unsloth's kernels cannot run")
    return EngineChoice("unsloth", f"{visible_gpus} GPU(s) visible")


def check_model_name(model_name: str) -> None:
    """
    Say so if a path leads nowhere, before a loader takes it for a name on the hub.

    Raises:
        FileNotFoundError: if `model_name` can only be a path, and does not exist on this machine.
    """
    is_path = os.path.isabs(model_name) or model_name.startswith((".", "~")) or model_name.count("/") > 1
    if is_path and not os.path.exists(model_name):
        raise FileNotFoundError(
            f"model_name={model_name!r} is a path that does not exist on this machine. Give an existing folder, or a "
            "hub id such as 'unsloth/Llama-3.2-1B-Instruct'."
        )
