"""`trl.SFTTrainer`, as Unsloth left it or plain, for several processes."""

from ..engines import select  # noqa: F401  # Unsloth comes before trl

# isort: split
import trl
from trl import SFTConfig

from .checks import check_columns
from .mixin import DistributedTrainerMixin
from .reference import engine_bases


class SFTTrainer(DistributedTrainerMixin, *engine_bases(trl.SFTTrainer)):
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


__all__ = ["SFTConfig", "SFTTrainer"]
