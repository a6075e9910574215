"""
Level dealing: samples of uneven length onto ranks and micro-batches, so that nobody waits for a long row.

Rows without padding cost what their tokens cost, and their attention grows with the square of each length. Padded rows
cost the longest of their micro-batch each. Everything here is a function of its arguments; no rank talks to another.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowCost:
    """
    What a sample costs, in tokens.

    Args:
        padded (`bool`): Whether rows of a micro-batch are padded to its longest.
        attention_per_token (`float`):
            Cost of one token's attention to one other token of its row, in units of a token's linear layers.
    """

    padded: bool = False
    attention_per_token: float = 0.0

    def of(self, length: int) -> float:
        return length * (1.0 + self.attention_per_token * length)

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that a micro-batch of these rows holds, padding included."""
        return len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)


def deal_level(costs: Sequence[float], parts: int) -> list[list[int]]:
    """
    Positions of `costs` on `parts` parts of nearly equal sum: longest processing time first (Graham, 1969).

    Example:

    ```python
    >>> from accelerate_unsloth.data.balance import deal_level
    >>> deal_level([9, 1, 4, 5], parts=2)
    [[0, 1], [2, 3]]
    ```
    """
    dealt = [[] for _ in range(parts)]
    loads = [(0.0, part) for part in range(parts)]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, part = loads[0]
        heapq.heapreplace(loads, (load + costs[position], part))
        dealt[part].append(position)
    return [sorted(part) for part in dealt]


def pack_padded(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """
    Positions of padded rows in at most `parts` micro-batches, the costliest of which costs as little as possible.

    A micro-batch costs its count times its longest, so it holds neighbours of the sorted lengths: many short rows, or
    few long ones. The cap that all of them keep is found by bisection.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def packed(cap: int) -> list[list[int]]:
        groups, start = [], 0
        while start < len(ordered):
            end = start + max(1, cap // max(1, lengths[ordered[start]]))
            groups.append(ordered[start:end])
            start = end
        return groups

    longest = max(1, *lengths) if lengths else 1
    low, high = longest, longest * max(1, len(lengths))
    while low < high:
        cap = (low + high) // 2
        low, high = (low, cap) if len(packed(cap)) <= parts else (cap + 1, high)
    return packed(low)


def deal_balanced(
    samples: Sequence[int],
    lengths: Sequence[int],
    world_size: int,
    cost: RowCost,
    count: int = 1,
    token_budget: int | None = None,
) -> list[list[list[int]]]:
    """
    Deal an effective batch to ranks and micro-batches; the numbers of samples may differ, the costs hardly.

    Args:
        samples (`Sequence[int]`): Indices of the samples.
        lengths (`Sequence[int]`): Tokens of each of them.
        world_size (`int`): Number of processes.
        cost ([`RowCost`]): What rows cost.
        count (`int`, *optional*, defaults to `1`): Micro-batches of each rank, if there is no `token_budget`.
        token_budget (`int`, *optional*): Most tokens of a micro-batch, padding included; as few as fit are formed.

    Returns:
        `list[list[list[int]]]`: samples of each micro-batch of each rank; none of them is empty.

    Raises:
        ValueError: if one sample alone exceeds the budget.

    Example:

    ```python
    >>> from accelerate_unsloth.data.balance import RowCost, deal_balanced
    >>> deal_balanced([7, 8, 9], [90, 50, 40], world_size=2, cost=RowCost())
    [[[7]], [[8, 9]]]
    ```
    """
    if cost.padded:
        return _deal_padded(samples, lengths, world_size, count, token_budget)
    shares = deal_level([cost.of(length) for length in lengths], world_size)
    return [
        cut([samples[i] for i in share], [lengths[i] for i in share], cost, count, token_budget) for share in shares
    ]


def cut(
    samples: Sequence[int], lengths: Sequence[int], cost: RowCost, count: int = 1, token_budget: int | None = None
) -> list[list[int]]:
    """Cut one rank's share into `count` level micro-batches, or into as few as keep `token_budget`."""
    if cost.padded:
        return _deal_padded(samples, lengths, 1, count, token_budget)[0]
    costs = [cost.of(length) for length in lengths]
    if token_budget is not None:
        check_fits(samples, lengths, token_budget)
        count = max(1, -(-sum(lengths) // token_budget))
    parts = deal_level(costs, count)
    # One sample a micro-batch fits in any case, so this ends.
    while token_budget is not None and any(sum(lengths[i] for i in part) > token_budget for part in parts):
        count += 1
        parts = deal_level(costs, count)
    return [[samples[i] for i in part] for part in parts if part]


def _deal_padded(samples, lengths, world_size: int, count: int, token_budget: int | None) -> list[list[list[int]]]:
    """Micro-batches are formed over all ranks first, because long rows belong together wherever they run."""
    if token_budget is not None:
        check_fits(samples, lengths, token_budget)  # else no count would be large enough
        count = max(1, -(-sum(lengths) // (world_size * token_budget)))
    while True:
        groups = pack_padded(lengths, world_size * count)
        tokens = [len(group) * lengths[group[0]] for group in groups]
        if token_budget is None or max(tokens, default=0) <= token_budget:
            break
        count += 1
    dealt = [[] for _ in range(world_size)]
    # There and back again over the micro-batches from the costliest on, so that each rank gets as many.
    for turn, group in enumerate(sorted(range(len(groups)), key=lambda i: -tokens[i])):
        lap, rank = divmod(turn, world_size)
        dealt[rank if lap % 2 == 0 else world_size - 1 - rank].append([samples[i] for i in groups[group]])
    return dealt


def check_fits(samples: Sequence[int], lengths: Sequence[int], token_budget: int) -> None:
    """
    Raises:
        ValueError: if one sample alone exceeds the budget.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise ValueError(
            f"Sample {samples[list(lengths).index(longest)]} has {longest} tokens, and a micro-batch may hold "
            f"{token_budget}. Lower max_length to {token_budget} or less, or raise micro_batch_tokens if you set it."
        )
