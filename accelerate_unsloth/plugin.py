"""Every option of the library: its default, its help, its check, and the environment variable that sets it."""

import difflib
import inspect
import os
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

PREFIX = "ACCELERATE_UNSLOTH_"
ENABLE = PREFIX + "ENABLE"

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class _NotGiven:
    """What a field holds until `__post_init__` has looked for its environment variable; `None` may be a value."""

    def __repr__(self) -> str:
        return "<from the environment>"


_NOT_GIVEN = _NotGiven()


def _option(default: Any, help: str, minimum: int = 1) -> Any:
    return field(default=_NOT_GIVEN, metadata={"default": default, "help": help, "minimum": minimum})


@dataclass
class UnslothPlugin:
    """
    Options of `accelerate_unsloth`, in the manner of Accelerate's own plugins.

    A field that is not given is read from the environment variable `ACCELERATE_UNSLOTH_<FIELD>`, and else takes its
    default. `None` is a value for the fields whose default it is. `"auto"` leaves a choice to the library, which shows it
    with its reason when training starts.

    Args:
        {options}

    Raises:
        ValueError: for a value that an option does not know, or an unknown `ACCELERATE_UNSLOTH_*` variable.

    Example:

    ```python
    >>> from accelerate_unsloth import UnslothPlugin
    >>> UnslothPlugin(micro_batch="fixed", bucket_cap_mb=50).ddp_kwargs().bucket_cap_mb
    50
    ```
    """

    engine: Literal["auto", "unsloth", "reference"] = _option(
        "auto",
        'Who builds the model: `"unsloth"`, or `"reference"` (transformers and PEFT, which also runs on a CPU). The engine is '
        "chosen when the library is first used, so set it with `ACCELERATE_UNSLOTH_ENGINE`.",
    )
    attention: Literal["auto", "varlen", "flash", "cudnn", "efficient", "unchanged"] = _option(
        "auto",
        'Attention kernel of rows of uneven length that run through PyTorch: `"varlen"` (one call for all rows), `"flash"`, '
        '`"cudnn"` or `"efficient"` while training; `"unchanged"` leaves the choice to PyTorch.',
    )
    gradient_checkpointing: Literal["auto", "none", "unsloth"] = _option(
        "auto",
        '`"none"` keeps activations, `"unsloth"` recomputes and offloads them. `"auto"` keeps them where they fit: a script\'s '
        '`use_gradient_checkpointing="unsloth"` or `True` means "save memory if needed", and `False` is obeyed.',
    )
    frozen_weights: Literal["auto", "replicated", "sharded", "host"] = _option(
        "auto",
        'Where the frozen weights of decoder layers live: on every rank (`"replicated"`), or once per node, a part on each GPU '
        '(`"sharded"`) or all in memory of the machine (`"host"`), from which a GPU copies each layer before it runs. `"auto"` '
        "shares them where copies for all ranks leave no room. The weights are placed when the model is loaded, so set it with "
        "`ACCELERATE_UNSLOTH_FROZEN_WEIGHTS`.",
    )
    balance_tokens: bool = _option(
        True, "Assign the samples of a step to ranks by their cost, so that no rank waits for another's long rows."
    )
    micro_batch: Literal["auto", "fixed"] = _option(
        "auto",
        '`"auto"` splits each effective batch into the fewest micro-batches that fit the memory; `"fixed"` keeps the split of '
        "the training arguments. Neither changes the samples of a step or its loss.",
    )
    micro_batch_tokens: int | None = _option(
        None,
        'For `micro_batch="auto"`: most tokens of a micro-batch, padding included. By default what the memory holds.',
    )
    memory_fraction: float = _option(
        0.9, 'For `"auto"`: part of each GPU\'s memory, or of what other processes leave of it, that planning may use.'
    )
    gradient_as_bucket_view: bool = _option(
        True, "For `ddp_kwargs()`: let gradients be views of DDP's buckets, which saves one copy of them."
    )
    find_unused_parameters: bool | None = _option(
        None, "For `ddp_kwargs()`: let DDP search for parameters without gradient. `None` leaves it to accelerate."
    )
    static_graph: bool = _option(
        False, "For `ddp_kwargs()`: promise DDP that every step uses the same parameters in the same order."
    )
    bucket_cap_mb: int = _option(25, "For `ddp_kwargs()`: size of DDP's buckets in MiB.")
    broadcast_buffers: bool = _option(
        False, "For `ddp_kwargs()`: let DDP copy rank 0's buffers to the others before a forward."
    )
    comm_hook: Literal["no", "fp16", "bf16"] = _option(
        "no", 'For `ddp_kwargs()`: `"fp16"` or `"bf16"` sends gradients in that precision.'
    )
    on_nonfinite: Literal["stop", "skip"] = _option(
        "stop",
        'What a loss or gradient that is not finite does, on any rank: `"stop"` ends the run with the rank and its samples, '
        '`"skip"` skips the step on all ranks.',
    )
    on_oversized: Literal["stop", "skip"] = _option(
        "stop",
        'What a single sample does that does not fit the memory: `"stop"` ends the run, `"skip"` leaves it out and reports it. '
        "Before that, activations are recomputed where keeping them was our choice. A micro-batch of several samples is split.",
    )
    watchdog_timeout_s: int | None = _option(
        None,
        "Longest time without any progress, in seconds, after which every rank writes its stacks and the run ends. By default "
        "an hour, or 0.8 of the training arguments' `ddp_timeout` (1440 of 1800) on several processes, because the process "
        "group gives up by itself after that. `0` switches it off; under a debugger it is off.",
        minimum=0,
    )
    monitor: bool = _option(
        True,
        "Log tokens per second, token imbalance, the slowest rank and memory with each loss, and warn once of memory that is "
        "about to run out.",
    )
    report: bool = _option(
        True,
        "Write `training_report.html` into the output folder when training ends: losses, speed, each rank's work, decisions, "
        "versions and the command, in one file. Secrets in it are hidden.",
    )
    log_on_each_rank: bool = _option(
        False, "Keep banners, progress bars and warnings on every rank, to look into a rank that differs."
    )

    def __post_init__(self):
        _reject_unknown_variables({f.name for f in fields(self)})
        hints = get_type_hints(type(self))
        for option in fields(self):
            value, source = getattr(self, option.name), option.name
            variable, default = PREFIX + option.name.upper(), option.metadata["default"]
            if value is None and default is not None:
                value = _NOT_GIVEN
            if value is _NOT_GIVEN and variable in os.environ:
                value, source = os.environ[variable], variable
            if value is _NOT_GIVEN:
                value = default
            elif value is not None:
                value = _parse(source, value, hints[option.name], option.metadata["minimum"])
            setattr(self, option.name, value)

    def ddp_kwargs(self, **overrides: Any):
        """
        Return the DDP preset as Accelerate wants it, for a custom loop whose model is wrapped in DDP.

        Args:
            overrides (`Any`):
                Fields of `DistributedDataParallelKwargs` that win over the preset.

        Returns:
            [`~accelerate.DistributedDataParallelKwargs`]: a plain instance, because `Accelerator` looks handlers up
            by their exact class and rejects a subclass (accelerate 1.15, `Accelerator.__init__`).
        """
        from accelerate import DistributedDataParallelKwargs
        from accelerate.utils import DDPCommunicationHookType

        preset = {
            "gradient_as_bucket_view": self.gradient_as_bucket_view,
            "static_graph": self.static_graph,
            "bucket_cap_mb": self.bucket_cap_mb,
            "broadcast_buffers": self.broadcast_buffers,
            # The enum, not its text: accelerate ignores a text (1.15, `register_comm_hook`).
            "comm_hook": DDPCommunicationHookType(self.comm_hook),
        }
        if self.find_unused_parameters is not None:
            preset["find_unused_parameters"] = self.find_unused_parameters
        return DistributedDataParallelKwargs(**{**preset, **overrides})

    def kwargs_handlers(self) -> list:
        """
        Return what to pass as `Accelerator(kwargs_handlers=...)` in a custom loop.

        Example:

        ```python
        >>> from accelerate import Accelerator
        >>> from accelerate_unsloth import UnslothPlugin
        >>> accelerator = Accelerator(kwargs_handlers=UnslothPlugin().kwargs_handlers())
        ```
        """
        return [self.ddp_kwargs()]


def _document(plugin: type) -> None:
    """Let docstring and signature show the options' help and their real defaults."""
    options, hints, lines = fields(plugin), get_type_hints(plugin), []
    for option in options:
        hint, default = hints[option.name], option.metadata["default"]
        kind = "str" if get_origin(hint) is Literal else getattr(hint, "__name__", str(hint).split(" ")[0])
        said = "" if default is None else f", defaults to `{default!r}`".replace("'", '"')
        lines.append(f"{option.name} (`{kind}`, *optional*{said}):")
        lines += textwrap.wrap(
            option.metadata["help"], 108, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    text = inspect.cleandoc(plugin.__doc__)  # by hand, because Python 3.13 does it while it compiles
    plugin.__doc__ = text.replace("    {options}", textwrap.indent("\n".join(lines), "    "))
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    plugin.__signature__ = inspect.Signature(
        [inspect.Parameter(o.name, keyword, default=o.metadata["default"], annotation=o.type) for o in options]
    )


_document(UnslothPlugin)


def enabled_by_environment() -> bool:
    """
    Return what `ACCELERATE_UNSLOTH_ENABLE` tells `python -m accelerate_unsloth`; true where it is not set.

    Raises:
        ValueError: if it is neither true nor false.
    """
    return _parse(ENABLE, os.environ.get(ENABLE, "1"), bool, 0)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parse(source: str, value: Any, hint: Any, minimum: int) -> Any:
    """Check `value` of the option or variable `source` against its type, reading it from text if it is text."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if value in allowed:
            return value
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint_text = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{source}={value!r} is not known; choose one of {', '.join(allowed)}.{hint_text}")
    if hint is float:
        return _parse_fraction(source, value)
    if hint in (int, int | None):
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = minimum - 1
        if number < minimum:
            raise ValueError(f"{source}={value!r} is not a whole number of at least {minimum}.")
        return number
    if isinstance(value, bool):
        return value
    if str(value).lower() in _TRUE | _FALSE:
        return str(value).lower() in _TRUE
    raise ValueError(f"{source}={value!r} is neither true nor false; use 1 or 0.")


def _parse_fraction(source: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number <= 1:
        raise ValueError(f"{source}={value!r} is no part of the memory; use a number above 0 and at most 1.")
    return number


def _reject_unknown_variables(options: set[str]) -> None:
    known = {ENABLE, *(PREFIX + option.upper() for option in options)}
    for variable in os.environ:
        if variable.startswith(PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Known ones are {', '.join(sorted(known))}."
            raise ValueError(f"The environment variable {variable} is not known to accelerate_unsloth. {advice}")
