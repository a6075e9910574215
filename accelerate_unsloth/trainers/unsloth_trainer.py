"""
`UnslothTrainer`: SFT with a learning rate of its own for embeddings, for continued pretraining.

With Unsloth it is Unsloth's class, whose loss is that of its SFTTrainer. The reference engine has the option alone.
"""

from ..engines.select import choice

# isort: split
from dataclasses import dataclass

from .sft import SFTConfig, SFTTrainer

if choice.name == "unsloth":
    from unsloth import UnslothTrainer as _UnslothTrainer
    from unsloth import UnslothTrainingArguments

    from .mixin import DistributedTrainerMixin

    class UnslothTrainer(DistributedTrainerMixin, _UnslothTrainer):
        """`unsloth.UnslothTrainer` that gives the same loss curve on one process and on N."""

else:

    @dataclass
    class UnslothTrainingArguments(SFTConfig):
        """
        `SFTConfig` with a learning rate for embeddings.

        Args:
            embedding_learning_rate (`float`, *optional*): Of embeddings that `modules_to_save` trains.
        """

        embedding_learning_rate: float | None = None

    class UnslothTrainer(SFTTrainer):
        """
        SFT with a learning rate of its own for embeddings.

        Args:
            args ([`UnslothTrainingArguments`]), kwargs (`Any`): As for [`SFTTrainer`].

        Example:

        ```python
        >>> from accelerate_unsloth import UnslothTrainer, UnslothTrainingArguments
        >>> args = UnslothTrainingArguments("out", learning_rate=5e-5, embedding_learning_rate=5e-6)
        >>> trainer = UnslothTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        >>> trainer.train()
        ```
        """

        def create_optimizer(self, *args, **kwargs):
            exists = self.optimizer is not None
            optimizer = super().create_optimizer(*args, **kwargs)
            rate = getattr(self.args, "embedding_learning_rate", None)
            if rate is None or exists:
                return optimizer
            named = self.model.named_parameters()
            embeddings = {id(p) for name, p in named if p.requires_grad and "modules_to_save" in name}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in embeddings]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in embeddings]
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
            return optimizer


__all__ = ["UnslothTrainer", "UnslothTrainingArguments"]
