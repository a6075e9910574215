"""
Keywords that `trl.SFTTrainer` once took and Unsloth's notebooks still use, as the installed TRL spells them.

The reference engine's trainer is TRL's, which refuses them. Unsloth translates them by itself, but beside plain
`TrainingArguments` TRL then drops what Unsloth has set, such as a `dataset_text_field` that is not "text" (unsloth 2026.10.6,
`_backwards_compatible_trainer` in trainer.py; trl 1.15.0, `SFTTrainer.__init__`). Delete that use when one of them mends it.
"""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

_RENAMED = {"max_seq_length": "max_length"}


def to_installed_trl(args: TrainingArguments | None, keywords: dict[str, Any]):
    """
    Move what belongs to the configuration out of a trainer's keywords.

    A keyword wins over the same option of `args`. Unknown ones are left for TRL to refuse; `tokenizer` is known to the
    trainer.

    Args:
        args (`TrainingArguments`, *optional*):
            As the script gave it: an `SFTConfig`, which is changed in place as Unsloth does, or plain
            `TrainingArguments`, from which one is made.
        keywords (`dict[str, Any]`):
            The trainer's other keywords.

    Returns:
        `tuple[SFTConfig | None, dict[str, Any]]`: the configuration, and the keywords that are left.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from accelerate_unsloth.patch.old_spellings import to_installed_trl
    >>> args, left = to_installed_trl(TrainingArguments("out", use_cpu=True), {"max_seq_length": 64, "model": None})
    >>> args.max_length, left
    (64, {'model': None})
    ```
    """
    options = {field.name for field in fields(SFTConfig) if field.init}
    # Unsloth's SFTConfig still has the old names.
    renamed = {old: new for old, new in _RENAMED.items() if old not in options}
    moved = {renamed.get(name, name): value for name, value in keywords.items() if name in options | _RENAMED.keys()}
    left = {name: value for name, value in keywords.items() if name not in options | _RENAMED.keys()}
    if isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
        # Field by field: `to_dict` would hide tokens and turn enums into text.
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        return SFTConfig(**given | moved), left
    if args is None and moved:
        return SFTConfig(**moved), left
    for name, value in moved.items():
        setattr(args, name, value)
    return args, left
