"""TRL's trainers with the settings that the loaders of the reference engine were given, as Unsloth's trainers have them."""

import inspect

import torch

from ..engines.select import choice


class ReferenceArguments:
    """Mixin between ours and a trainer of TRL's, for the reference engine."""

    def __init__(self, *args, tokenizer=None, **kwargs):
        if tokenizer is not None:  # its old name, which Unsloth's trainers also take
            kwargs.setdefault("processing_class", tokenizer)
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        if hasattr(given.get("args"), "max_length"):  # a configuration of TRL's
            _take_settings_of_model(given["args"], given["model"])
        if given.get("args") is not None:
            _name_cpu_plainly(given["args"])
        super().__init__(*args, **kwargs)


def _take_settings_of_model(args, model) -> None:
    """Let what the loader was told win over the trainer's defaults, as in Unsloth's trainers."""
    longest = getattr(model, "max_seq_length", None)
    if longest is not None and args.max_length is not None:
        given = args.max_length != type(args).__dataclass_fields__["max_length"].default
        args.max_length = min(longest, args.max_length) if given else longest
    args.gradient_checkpointing = getattr(model, "_accelerate_unsloth_checkpointing", args.gradient_checkpointing)


def _name_cpu_plainly(args) -> None:
    """
    Use one device per process, under a name that `torch.load` can map to.

    Among several CPU processes accelerate calls the device `cpu:0` (1.15.0, `PartialState.set_device`), to which
    `torch.load` cannot map an optimizer's state when a run resumes. Delete this when either of them changes.
    """
    if args.device.type == "cpu":
        vars(args)["_setup_devices"] = torch.device("cpu")
    if args.n_gpu > 1:  # one process, several GPUs: use one, as Unsloth does, instead of nn.DataParallel
        args._n_gpu = 1


def engine_bases(trainer_class: type) -> tuple[type, ...]:
    """Return the bases of our trainer in front of TRL's class, as the engine left it."""
    return (ReferenceArguments, trainer_class) if choice.name == "reference" else (trainer_class,)
