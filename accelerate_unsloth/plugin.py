"""Every option of the library: its default, its check, and the environment variable that sets it."""

import difflib
import os
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


def _option(default: Any, minimum: int = 1) -> Any:
    return field(default=_NOT_GIVEN, metadata={"default": default, "minimum": minimum})


@dataclass
class UnslothPlugin:
    """
    Options of `accelerate_unsloth`, in the manner of Accelerate's own plugins.

    A field that is not given is read from the environment variable `ACCELERATE_UNSLOTH_<FIELD>`, and else takes its
    default; `None` is a value for those whose default it is. `"auto"` leaves a choice to the library, which shows it with its reason when training starts.

    Args:
        engine (`str`, *optional*, defaults to `"auto"`):
            Who builds the model: `"unsloth"`, or `"reference"` (transformers and PEFT, which also runs on a CPU).
            The engine is chosen when the library is first used, so set it with `ACCELERATE_UNSLOTH_ENGINE`.
        gradient_sync (`str`, *optional*, defaults to `"auto"`):
            `"after_backward"` reduces all gradients once per optimizer step, in one flat all-reduce; `"overlapped"`
            lets `DistributedDataParallel` reduce them in buckets during the last backward.
        attention (`str`, *optional*, defaults to `"auto"`):
            Attention kernel of rows of uneven length that run through PyTorch: `"varlen"` (one call for all rows),
            `"flash"`, `"cudnn"` or `"efficient"` while training; `"unchanged"` leaves PyTorch its choice.
        gradient_checkpointing (`str`, *optional*, defaults to `"auto"`):
            `"none"` keeps activations, `"unsloth"` recomputes and offloads them. `"auto"` keeps them where they fit: a
            script's `use_gradient_checkpointing="unsloth"` or `True` means "save memory if needed", and `False` is obeyed.
        balance_tokens (`bool`, *optional*, defaults to `True`):
            Deal the samples of a step to ranks by their cost, so that no rank waits for another's long rows.
        micro_batch (`str`, *optional*, defaults to `"auto"`):
            `"auto"` cuts each effective batch into the fewest micro-batches that fit the memory; `"fixed"` keeps the
            cut of the training arguments. Neither changes the samples of a step or its loss.
        micro_batch_tokens (`int`, *optional*):
            For `micro_batch="auto"`: most tokens of a micro-batch, padding included. By default what the memory holds.
        memory_fraction (`float`, *optional*, defaults to `0.9`):
            For `"auto"`: part of each GPU's memory that planning may use.
        gradient_as_bucket_view (`bool`, *optional*, defaults to `True`):
            For `"overlapped"`: let gradients be views of DDP's buckets, which saves one copy of them.
        find_unused_parameters (`bool`, *optional*):
            For `"overlapped"`: let DDP search for parameters without gradient. Left to the Trainer when `None`.
        static_graph (`bool`, *optional*, defaults to `False`):
            For `"overlapped"`: promise DDP that every step uses the same parameters in the same order.
        bucket_cap_mb (`int`, *optional*, defaults to `25`):
            For `"overlapped"`: size of DDP's buckets in MiB.
        broadcast_buffers (`bool`, *optional*, defaults to `False`):
            For `"overlapped"`: let DDP copy rank 0's buffers to the others before a forward.
        comm_hook (`str`, *optional*, defaults to `"no"`):
            For `"overlapped"`: `"fp16"` or `"bf16"` sends gradients in that precision.
        on_nonfinite (`str`, *optional*, defaults to `"stop"`):
            What a loss or gradient that is not finite does, on any rank: `"stop"` ends the run with the rank and its
            samples, `"skip"` passes over the step on all ranks.
        on_oversized (`str`, *optional*, defaults to `"stop"`):
            What a single sample does that does not fit the memory: `"stop"` ends the run, `"skip"` leaves it out and
            says so. A micro-batch of several samples is cut in two instead.
        watchdog_timeout_s (`int`, *optional*):
            Longest time without any progress, in seconds, after which every rank writes its stacks and the run ends. By
            default an hour, or 0.8 of the training arguments' `ddp_timeout` (1440 of 1800) on several processes, because
            the process group gives up by itself after that. `0` switches it off; under a debugger it is off.
        monitor (`bool`, *optional*, defaults to `True`):
            Log tokens per second, token imbalance, the slowest rank and memory with each loss, and warn once of memory
            that is about to run out.
        report (`bool`, *optional*, defaults to `True`):
            Write `training_report.html` into the output folder when training ends: losses, speed, what each rank did,
            decisions, versions and the command, in one file. Secrets in it are hidden.
        log_on_each_rank (`bool`, *optional*, defaults to `False`):
            Keep banners, progress bars and warnings on every rank, to look into a rank that differs.

    Raises:
        ValueError: for a value that an option does not know, or an unknown `ACCELERATE_UNSLOTH_*` variable.

    Example:

    ```python
    >>> from accelerate_unsloth import UnslothPlugin
    >>> UnslothPlugin(gradient_sync="overlapped", bucket_cap_mb=50).ddp_kwargs().bucket_cap_mb
    50
    ```
    """

    engine: Literal["auto", "unsloth", "reference"] = _option("auto")
    gradient_sync: Literal["auto", "after_backward", "overlapped"] = _option("auto")
    attention: Literal["auto", "varlen", "flash", "cudnn", "efficient", "unchanged"] = _option("auto")
    gradient_checkpointing: Literal["auto", "none", "unsloth"] = _option("auto")
    balance_tokens: bool = _option(True)
    micro_batch: Literal["auto", "fixed"] = _option("auto")
    micro_batch_tokens: int | None = _option(None)
    memory_fraction: float = _option(0.9)
    gradient_as_bucket_view: bool = _option(True)
    find_unused_parameters: bool | None = _option(None)
    static_graph: bool = _option(False)
    bucket_cap_mb: int = _option(25)
    broadcast_buffers: bool = _option(False)
    comm_hook: Literal["no", "fp16", "bf16"] = _option("no")
    on_nonfinite: Literal["stop", "skip"] = _option("stop")
    on_oversized: Literal["stop", "skip"] = _option("stop")
    watchdog_timeout_s: int | None = _option(None, minimum=0)
    monitor: bool = _option(True)
    report: bool = _option(True)
    log_on_each_rank: bool = _option(False)

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
        The DDP preset as Accelerate wants it.

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
            # The enum, not its text: accelerate passes over a text without a word (1.15, `register_comm_hook`).
            "comm_hook": DDPCommunicationHookType(self.comm_hook),
        }
        if self.find_unused_parameters is not None:
            preset["find_unused_parameters"] = self.find_unused_parameters
        return DistributedDataParallelKwargs(**{**preset, **overrides})

    def kwargs_handlers(self) -> list:
        """
        What to pass as `Accelerator(kwargs_handlers=...)` in a loop of one's own.

        Example:

        ```python
        >>> from accelerate import Accelerator
        >>> from accelerate_unsloth import UnslothPlugin
        >>> accelerator = Accelerator(kwargs_handlers=UnslothPlugin().kwargs_handlers())
        ```
        """
        return [self.ddp_kwargs()]


def enabled_by_environment() -> bool:
    """
    What `ACCELERATE_UNSLOTH_ENABLE` says to `python -m accelerate_unsloth`; true where it is not set.

    Raises:
        ValueError: if it is neither true nor false.
    """
    return _parse(ENABLE, os.environ.get(ENABLE, "1"), bool, 0)


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
            raise ValueError(f"{source}={value!r} is not a whole number of at least {minimum}. Give one.")
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
        raise ValueError(f"{source}={value!r} is not a part of the memory; give a number above 0 and at most 1.")
    return number


def _reject_unknown_variables(options: set[str]) -> None:
    known = {ENABLE, *(PREFIX + option.upper() for option in options)}
    for variable in os.environ:
        if variable.startswith(PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Known ones are {', '.join(sorted(known))}."
            raise ValueError(f"The environment variable {variable} is not known to accelerate_unsloth. {advice}")
