"""`trl.SFTTrainer`, as Unsloth left it or plain, for several processes."""

from ..engines.select import choice

# isort: split
import torch
import trl
from trl import SFTConfig

from .checks import check_columns
from .mixin import DistributedTrainerMixin


class _ReferenceSFTTrainer(trl.SFTTrainer):
    """TRL's trainer, with the settings that `FastLanguageModel` of the reference engine was given."""

    def __init__(self, model, args=None, *rest, tokenizer=None, **kwargs):
        if tokenizer is not None:  # its old name, which Unsloth's trainer also takes
            kwargs.setdefault("processing_class", tokenizer)
        if isinstance(args, SFTConfig):
            _take_settings_of_model(args, model)
            _name_cpu_plainly(args)
        super().__init__(model, args, *rest, **kwargs)


def _take_settings_of_model(args, model) -> None:
    """What `FastLanguageModel` was told wins over the trainer's defaults, as in Unsloth's trainer."""
    longest = getattr(model, "max_seq_length", None)
    if longest is not None and args.max_length is not None:
        given = args.max_length != SFTConfig.__dataclass_fields__["max_length"].default
        args.max_length = min(longest, args.max_length) if given else longest
    args.gradient_checkpointing = getattr(model, "_accelerate_unsloth_checkpointing", args.gradient_checkpointing)
    if args.n_gpu > 1:  # one process, several GPUs: use one, as Unsloth does, instead of nn.DataParallel
        args._n_gpu = 1


def _name_cpu_plainly(args) -> None:
    """
    Among several CPU processes accelerate calls the device `cpu:0` (1.15.0, `PartialState.set_device`), to which
    `torch.load` cannot map an optimizer's state when a run resumes. Delete this when either of them changes.
    """
    if args.device.type == "cpu":
        vars(args)["_setup_devices"] = torch.device("cpu")


class SFTTrainer(DistributedTrainerMixin, _ReferenceSFTTrainer if choice.name == "reference" else trl.SFTTrainer):
    """
    `trl.SFTTrainer` that gives the same loss curve on one process and on N.

    Args:
        args (`Any`), kwargs (`Any`):
            As for `trl.SFTTrainer`.
        plugin ([`UnslothPlugin`], *optional*):
            Options; by default those of the environment.

    Raises:
        ValueError: for data without samples, without a usable column or without labels, or ranks that were set up
            differently.

    Example:

    ```python
    >>> from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer
    >>> model, tokenizer = FastLanguageModel.from_pretrained("path/to/model", max_seq_length=2048)
    >>> model = FastLanguageModel.get_peft_model(model, r=16)
    >>> trainer = SFTTrainer(model, SFTConfig("out"), train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        text_field = kwargs.get("dataset_text_field") or getattr(args, "dataset_text_field", None) or "text"
        for split, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
            check_columns(dataset, split, text_field, kwargs.get("formatting_func"))
        # By keyword: Unsloth reads old spellings, such as max_seq_length, only beside a keyword `args`.
        given = {"args": args, "data_collator": data_collator, "processing_class": processing_class}
        given = {name: value for name, value in given.items() if value is not None}
        super().__init__(model=model, train_dataset=train_dataset, eval_dataset=eval_dataset, **given, **kwargs)
