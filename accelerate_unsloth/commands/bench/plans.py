"""Which runs a benchmark consists of."""

from .runs import Run

# Our choices taken back one by one: an option of UnslothPlugin as an environment variable, and the choices that would
# follow from it, which stay as the whole of ours made them.
ABLATIONS = {
    "without our attention kernel": ({"ACCELERATE_UNSLOTH_ATTENTION": "unchanged"}, ()),
    "without balanced ranks": ({"ACCELERATE_UNSLOTH_BALANCE_TOKENS": "0"}, ()),
    "without planned micro-batches": ({"ACCELERATE_UNSLOTH_MICRO_BATCH": "fixed"}, ("checkpointing",)),
    "with Unsloth's checkpointing": ({"ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING": "unsloth"}, ()),
}


def plan(
    processes: list[int], plain_batches: list[int], batch: int, with_trl: bool = True, ablation: bool = True
) -> list[Run]:
    """
    The runs of a comparison: plain Unsloth at each per-device batch, TRL, ours, and ours with each choice taken back.

    Args:
        processes (`list[int]`): Numbers of processes to compare at.
        plain_batches (`list[int]`): Per-device batches of plain Unsloth, of which the best one counts.
        batch (`int`): Per-device batch that ours is given; its effective batch is the same.
        with_trl (`bool`, *optional*, defaults to `True`):
            Also TRL and PEFT without Unsloth, at the smallest of these batches, because they keep more in memory.
        ablation (`bool`, *optional*, defaults to `True`): Take our choices back one by one, on the most processes.

    Example:

    ```python
    >>> from accelerate_unsloth.commands.bench.plans import plan
    >>> [run.name for run in plan([2], [4, 16], batch=16, with_trl=False, ablation=False)]
    ['2 x plain, batch 4', '2 x plain, batch 16', '2 x ours']
    ```
    """
    runs, smallest = [], min([*plain_batches, batch])
    for count in processes:
        runs += [Run(f"{count} x plain, batch {size}", "plain", count, size) for size in plain_batches]
        if with_trl:
            runs.append(Run(f"{count} x TRL + PEFT, batch {smallest}", "trl", count, smallest))
        runs.append(Run(f"{count} x ours", "ours", count, batch))
    if ablation:
        most = max(processes)
        for what, (variables, keeps) in ABLATIONS.items():
            runs.append(Run(f"{most} x ours {what}", "ours", most, batch, variables, keeps=keeps))
    return runs
