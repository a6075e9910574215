"""What is replaced in Unsloth, TRL and transformers, all in memory and through the patch log."""

import functools
import sys
from dataclasses import fields
from importlib import import_module
from typing import Any

from ..engines.select import LOADERS, choice

# isort: split
import trl
from transformers import TrainingArguments
from trl import SFTConfig

from ..launch.topology import topology
from ..patches import Patch, patch_log
from ..trainers.kto import KTOTrainer
from ..trainers.orpo_cpo import CPOTrainer, ORPOTrainer
from ..trainers.preference import DPOTrainer, RewardTrainer
from ..trainers.sft import SFTTrainer
from ..trainers.unsloth_trainer import UnslothTrainer, UnslothTrainingArguments

_TRAINERS = (SFTTrainer, DPOTrainer, RewardTrainer, KTOTrainer, ORPOTrainer, CPOTrainer)
_RENAMED = {"max_seq_length": "max_length"}


def install(options: dict[str, Any], plugin, on_cpu: bool, patches: list[Patch]) -> None:
    """
    Replace everything that an unmodified script calls; raise `RuntimeError` if it already holds one of the originals.

    `options` are those of `enable_multi_gpu`, and `plugin` is for trainers that are not given one. `patches` takes each patch
    as soon as it is made, so that a failure can be undone.
    """
    _check_call_is_early()

    def patch(owner, name, replacement):
        patches.append(patch_log.patch(owner, name, replacement))

    if choice.name == "reference":
        from ..engines.reference import make_unsloth_module

        module = make_unsloth_module()
        module.UnslothTrainer, module.UnslothTrainingArguments = UnslothTrainer, UnslothTrainingArguments
        patch(sys.modules, "unsloth", module)
    else:
        for name, replacement in {**LOADERS, "UnslothTrainer": UnslothTrainer}.items():
            patch(sys.modules["unsloth"], name, replacement)
    for trainer in _TRAINERS:
        for home in _homes(trainer.__name__):
            patch(home, trainer.__name__, trainer)
        init = _init_with_old_keywords(trainer.__init__) if trainer is SFTTrainer else trainer.__init__
        patch(trainer, "__init__", _init_with_plugin(init, plugin))
    if not issubclass(UnslothTrainer, SFTTrainer):  # Unsloth's own
        patch(UnslothTrainer, "__init__", _init_with_plugin(UnslothTrainer.__init__, plugin))
    patch(TrainingArguments, "__post_init__", _arguments_post_init(options, on_cpu))
    if options["enable_gradient_checkpointing"] is not None:
        for loader in set(LOADERS.values()):
            for name in ("from_pretrained", "get_peft_model"):
                call = _with_checkpointing(getattr(loader, name), options["enable_gradient_checkpointing"])
                patch(loader, name, staticmethod(call))


def _homes(trainer: str) -> list:
    """Return the modules that a script may take a trainer of TRL's from."""
    short = trainer.removesuffix("Trainer").lower()
    if hasattr(trl, trainer):
        return [trl, trl.trainer, import_module(f"trl.trainer.{short}_trainer")]
    package = f"trl.experimental.{short}"
    return [import_module(package), import_module(f"{package}.{short}_trainer")]


def _check_call_is_early() -> None:
    unsloth = sys.modules.get("unsloth")
    names = [trainer.__name__ for trainer in _TRAINERS]
    originals = {id(getattr(home, name)): f"trl.{name}" for name in names for home in _homes(name)}
    originals |= {id(getattr(unsloth, name)): f"unsloth.{name}" for name in LOADERS if hasattr(unsloth, name)}
    for name, value in vars(sys.modules["__main__"]).items():
        if id(value) in originals:
            raise RuntimeError(
                f"enable_multi_gpu() is called too late: the script has already imported {originals[id(value)]} as "
                f"{name!r} and would keep using it. Call enable_multi_gpu() before importing unsloth and trl."
            )


def _init_with_plugin(init, plugin):
    """Return a trainer's `__init__` with a default `plugin`."""

    @functools.wraps(init, assigned=("__doc__",))
    def patched_init(self, *args, **keywords):
        if keywords.get("plugin") is None:
            keywords["plugin"] = plugin
        init(self, *args, **keywords)

    return patched_init


def _init_with_old_keywords(init):
    """Return `SFTTrainer.__init__` with support for keywords that it once took."""

    @functools.wraps(init, assigned=("__doc__",))
    def patched_init(self, model=None, args=None, *rest, **keywords):
        if choice.name == "reference" or (args is not None and not isinstance(args, SFTConfig)):
            args, keywords = to_installed_trl(args, keywords)
        # Unsloth reads old keywords only beside a keyword `args`, which the trainer's own __init__ takes care of.
        init(self, model, args, *rest, **keywords)

    return patched_init


def to_installed_trl(args: TrainingArguments | None, keywords: dict[str, Any]):
    """
    Move keywords that `SFTTrainer` once took into the configuration, under their current names.

    A keyword overrides the same option of `args`. Unknown keywords are left for TRL to reject. The reference engine's
    trainer is TRL's and rejects old keywords. Unsloth translates them, but beside plain `TrainingArguments` TRL then drops
    what Unsloth has set, such as a `dataset_text_field` (unsloth 2026.10.6, `_backwards_compatible_trainer` in trainer.py;
    trl 1.15.0, `SFTTrainer.__init__`). Delete that use when one of them fixes it.

    Returns:
        `tuple[SFTConfig | None, dict[str, Any]]`: an `SFTConfig` given as `args`, changed in place, or a new one made from
        plain `TrainingArguments`; and the remaining keywords.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from accelerate_unsloth.patch.points import to_installed_trl
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


def _arguments_post_init(options: dict[str, Any], on_cpu: bool):
    """Return `TrainingArguments.__post_init__` that first sets what the options and the launch require."""
    original, named = TrainingArguments.__post_init__, set()

    @functools.wraps(original, assigned=("__doc__",))
    def patched_post_init(self):
        if options["batch_size_per_gpu"] is not None:
            self.per_device_train_batch_size = options["batch_size_per_gpu"]
        if options["enable_gradient_checkpointing"] is not None:
            self.gradient_checkpointing = options["enable_gradient_checkpointing"]
        if on_cpu:  # a script written for GPUs does not say so, and bf16=True would be rejected without it
            self.use_cpu = True
            if topology().world_size > 1:
                self.ddp_backend = "gloo"
        original(self)
        trainer = f"{type(self).__name__.removeprefix('Unsloth').removesuffix('Config')}Trainer"
        ours = [known.__name__ for known in _TRAINERS]
        if trainer not in ours and trainer in trl.__all__ and topology().is_main and trainer not in named:
            named.add(trainer)
            print(
                f"accelerate_unsloth: {trainer} is TRL's own and trains with DistributedDataParallel; enable_multi_gpu() "
                f"replaces {', '.join(ours)}."
            )

    return patched_post_init


def _with_checkpointing(call, wanted: bool):
    """Return a loading call with gradient checkpointing on or off, whatever the script says."""

    @functools.wraps(call, assigned=("__doc__",))
    def patched_call(*args, **keywords):
        # The script chooses the kind of checkpointing; "unsloth" is the default of both calls.
        chosen = keywords.get("use_gradient_checkpointing") or "unsloth"
        keywords["use_gradient_checkpointing"] = chosen if wanted else False
        return call(*args, **keywords)

    return patched_call
