"""What was decided for a run, and why: the rows of the start-up table and of the training report."""

from ..reporting.startup_table import Row, versions
from ..weights import placed_weights

_GIB = 2**30


def rows(trainer, engine) -> list[Row]:
    """Return subject, decision and reason of each choice of a trainer that is prepared for training."""
    args, plan = trainer.args, trainer.plan
    split = f"per device {args.per_device_train_batch_size} x accumulation {args.gradient_accumulation_steps}"
    return [
        ("engine", engine.name, engine.reason),
        (
            "effective batch",
            f"{trainer.effective_batch} samples",
            f"{split} x processes {trainer.accelerator.num_processes}",
        ),
        _reduction(trainer),
        ("loss", f"mean over all {trainer.adapter.unit}", _loss_reason(trainer)),
        ("samples", *_sampling(trainer)),
        *_evaluation(trainer),
        ("micro-batches", plan.micro_batch.mode, plan.micro_batch.reason),
        ("recompute", plan.checkpointing.label, plan.checkpointing.reason),
        ("attention", trainer.attention.backend, trainer.attention.reason),
        *_frozen_weights(trainer),
        _trainable(trainer),
        ("versions", "", ", ".join(f"{name} {number}" for name, number in versions().items())),
    ]


def _reduction(trainer) -> Row:
    if trainer.accelerator.num_processes == 1:
        return "gradient sync", "none", "one process"
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return (
        "gradient sync",
        "once per step",
        f"{4 * trainable / _GIB:.2f} GiB of gradients in float32, after the backward",
    )


def _frozen_weights(trainer) -> list[Row]:
    placed = placed_weights(trainer.model)
    return [("frozen weights", placed.choice.mode, placed.choice.reason)] if placed else []


def _trainable(trainer) -> Row:
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trainable, every = sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
    return "trainable", f"{trainable:,}", f"of {every:,} parameters ({100 * trainable / max(every, 1):.2f}%)"


def _loss_reason(trainer) -> str:
    choice = trainer.adapter.choice
    if choice is None:
        return "of all ranks and micro-batches; how the custom loss uses num_items_in_batch is tried in the first step"
    if trainer.token_mean_was_off:
        return f"{choice.reason}; average_tokens_across_devices=False would weigh ranks, not {trainer.adapter.unit}"
    return choice.reason


def _sampling(trainer) -> tuple[str, str]:
    if trainer.balances_tokens:
        return "balanced", "assigned to ranks by tokens; the same in each step on any number of processes"
    if trainer.plans_samples(trainer.train_dataset):
        return "planned", "each sample once per epoch, the same in each step on any number of processes"
    return "streamed", "the dataset has no length, so accelerate splits the stream; steps depend on the processes"


def _evaluation(trainer) -> list[Row]:
    """Name what of the evaluation depends on the number of processes, which the choice of the best checkpoint may too."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    if trainer.accelerator.num_processes == 1 or all(dataset is None for dataset in sets.values()):
        return []
    if trainer.compute_metrics is not None:
        return [("evaluation", "stock loop", "for compute_metrics; eval_loss is a mean of batch means")]
    if not all(trainer.plans_samples(dataset) for dataset in sets.values()):
        return [("evaluation", "streamed", "without a length; eval_loss is a mean of batch means")]
    return []
