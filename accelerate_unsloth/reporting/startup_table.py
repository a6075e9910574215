"""The table that rank 0 prints before training: what was decided, and why."""

from importlib.metadata import version

from rich.console import Console
from rich.table import Table

_VERSIONS = ("unsloth", "trl", "transformers", "accelerate", "peft", "torch")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    return {name: version(name) for name in _VERSIONS}


def rows(trainer, engine) -> list[tuple[str, str, str]]:
    """Return subject, decision and reason of each line."""
    args, world_size = trainer.args, trainer.accelerator.num_processes
    parameters = list(trainer.model.parameters())
    trainable, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    micro_batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return [
        ("engine", engine.name, engine.reason),
        (
            "effective batch",
            f"{trainer.effective_batch} samples",
            f"per device {micro_batch} x accumulation {accumulation} x processes {world_size}",
        ),
        ("gradient sync", trainer.gradient_sync.mode, trainer.gradient_sync.reason),
        ("loss", "mean over all tokens", _loss_reason(trainer)),
        ("samples", *_sampling(trainer)),
        *_evaluation(trainer),
        ("micro-batches", trainer.micro_batch.mode, trainer.micro_batch.reason),
        ("recompute", trainer.checkpointing.mode, trainer.checkpointing.reason),
        ("attention", trainer.attention.backend, trainer.attention.reason),
        ("trainable", f"{trainable:,}", f"of {total:,} parameters ({100 * trainable / max(total, 1):.2f}%)"),
        ("versions", "", ", ".join(f"{name} {number}" for name, number in versions().items())),
    ]


def _loss_reason(trainer) -> str:
    if trainer.loss is None:
        return "of all ranks and micro-batches; the first step finds out how the custom loss uses num_items_in_batch"
    if trainer.token_mean_was_off:
        return f"{trainer.loss.reason}; average_tokens_across_devices=False would weight ranks, not tokens"
    return trainer.loss.reason


def _sampling(trainer) -> tuple[str, str]:
    if trainer.balances_tokens:
        return "balanced", "assigned to ranks by tokens; each step has the same samples on any number of processes"
    if trainer.plans_samples(trainer.train_dataset):
        return "planned", "each sample once per epoch; each step has the same samples on any number of processes"
    return (
        "streamed",
        "the dataset has no length, so accelerate splits the stream; steps depend on the number of processes",
    )


def _evaluation(trainer) -> list[tuple[str, str, str]]:
    """Return how eval_loss depends on the number of processes, because it may decide which checkpoint is the best."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    if trainer.accelerator.num_processes == 1 or all(rows is None for rows in sets.values()):
        return []
    if trainer.compute_metrics is not None:
        return [("evaluation", "stock loop", "for compute_metrics; eval_loss is a mean of batch means")]
    if not all(trainer.plans_samples(rows) for rows in sets.values()):
        return [("evaluation", "streamed", "the dataset has no length; eval_loss is a mean of batch means")]
    return []


def show(trainer, engine) -> None:
    """Print the table on rank 0."""
    if not trainer.is_world_process_zero():
        return
    table = Table(title="accelerate_unsloth", title_justify="left", show_header=False, pad_edge=False)
    for subject, decision, reason in rows(trainer, engine):
        table.add_row(subject, decision, reason)
    console = Console()
    # Without a terminal rich uses 80 columns, which is too narrow for the reasons.
    (console if console.is_terminal else Console(width=120)).print(table)
