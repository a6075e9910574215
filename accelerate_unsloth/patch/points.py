"""What of Unsloth, TRL and transformers is replaced in memory, each through the ledger."""

import functools
import sys

from ..engines.loaded import LOADERS, choice

# isort: split
import transformers
import trl.trainer.sft_trainer

from ..launch.topology import topology
from ..patches import Patch, ledger
from ..trainers.sft import SFTTrainer
from .old_spellings import SFTConfig, to_installed_trl
from .options import BackendChoice, Options

# A script may take the trainer from any of them.
_HOMES_OF_TRAINER = (trl, trl.trainer, trl.trainer.sft_trainer)
_named: set[str] = set()


def install(options: Options, plugin, backend: BackendChoice, on_cpu: bool, patches: list[Patch]) -> None:
    """
    Replace everything that an unmodified script calls.

    Args:
        options ([`Options`]): The user's.
        plugin ([`UnslothPlugin`]): For trainers that are not given one.
        backend ([`BackendChoice`]): Of the process group.
        on_cpu (`bool`): Whether this launch stays on the CPU.
        patches (`list[Patch]`): Takes each patch as soon as it is made, so that a failure can be undone.

    Raises:
        RuntimeError: if the script already holds one of the originals.
    """
    refuse_late_call()

    def patch(owner, name, replacement):
        patches.append(ledger.patch(owner, name, replacement))

    if choice.name == "reference":
        from ..engines import stand_in

        patch(sys.modules, "unsloth", stand_in.make_module())
    else:
        for name, loader in LOADERS.items():
            patch(sys.modules["unsloth"], name, loader)
    for home in _HOMES_OF_TRAINER:
        patch(home, "SFTTrainer", SFTTrainer)
    patch(SFTTrainer, "__init__", trainer_init(SFTTrainer.__init__, plugin))
    patch(transformers.TrainingArguments, "__post_init__", arguments_post_init(options, backend, on_cpu))
    if options.enable_gradient_checkpointing is not None:
        for loader in set(LOADERS.values()):
            for name in ("from_pretrained", "get_peft_model"):
                wanted = with_checkpointing(getattr(loader, name), options.enable_gradient_checkpointing)
                patch(loader, name, staticmethod(wanted))


def refuse_late_call() -> None:
    """
    Raises:
        RuntimeError: if the script imported something before it could be replaced.
    """
    unsloth = sys.modules.get("unsloth")
    originals = {id(home.SFTTrainer): "trl.SFTTrainer" for home in _HOMES_OF_TRAINER}
    originals |= {id(getattr(unsloth, name)): f"unsloth.{name}" for name in LOADERS if hasattr(unsloth, name)}
    for name, value in vars(sys.modules["__main__"]).items():
        if id(value) in originals:
            raise RuntimeError(
                f"enable_multi_gpu() comes too late: the script holds {originals[id(value)]} as {name!r} already, and "
                "would go on using it. Call enable_multi_gpu() in the first line, before importing unsloth and trl."
            )


def trainer_init(init, plugin):
    """`SFTTrainer.__init__` that takes `plugin` where none is given, and keywords in their old spellings."""

    @functools.wraps(init, assigned=("__doc__",))
    def patched_init(self, model=None, args=None, *rest, **keywords):
        if keywords.get("plugin") is None:
            keywords["plugin"] = plugin
        if choice.name == "reference" or (args is not None and not isinstance(args, SFTConfig)):
            args, keywords = to_installed_trl(args, keywords)
        # Unsloth reads old spellings only beside a keyword `args`, which the trainer's own __init__ sees to.
        init(self, model, args, *rest, **keywords)

    return patched_init


def arguments_post_init(options: Options, backend: BackendChoice, on_cpu: bool):
    """`TrainingArguments.__post_init__` that sets what was asked for before anything is derived from it."""
    original = transformers.TrainingArguments.__post_init__

    @functools.wraps(original, assigned=("__doc__",))
    def patched_post_init(self):
        if options.batch_size_per_gpu is not None:
            self.per_device_train_batch_size = options.batch_size_per_gpu
        if options.enable_gradient_checkpointing is not None:
            self.gradient_checkpointing = options.enable_gradient_checkpointing
        if on_cpu:  # a script written for GPUs does not say so, and bf16=True would be refused without it
            self.use_cpu = True
        if backend.name != "none" and (on_cpu or self.ddp_backend is None):
            self.ddp_backend = backend.name
        original(self)
        _name_other_trainers(type(self).__name__)

    return patched_post_init


def _name_other_trainers(arguments: str) -> None:
    """Say once that a trainer is TRL's own, from the class of its arguments."""
    trainer = f"{arguments.removeprefix('Unsloth').removesuffix('Config')}Trainer"
    if trainer != "SFTTrainer" and trainer in trl.__all__ and topology().is_main and trainer not in _named:
        _named.add(trainer)
        print(
            f"accelerate_unsloth: {trainer} stays trl's own and trains under DistributedDataParallel; what enable_multi_gpu() "
            "brings, SFTTrainer has."
        )


def with_checkpointing(call, wanted: bool):
    """A loading call that checkpoints activations or does not, whatever the script says."""

    @functools.wraps(call, assigned=("__doc__",))
    def patched_call(*args, **keywords):
        chosen = keywords.get("use_gradient_checkpointing")
        # Which kind of checkpointing is the script's to say; "unsloth" is the default of both calls.
        keywords["use_gradient_checkpointing"] = (chosen or "unsloth") if wanted else False
        return call(*args, **keywords)

    return patched_call
