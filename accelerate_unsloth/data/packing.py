"""
Balanced assignment of samples of uneven length to ranks and micro-batches, so that no rank waits for a long row.

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


def assign_longest_first(costs: Sequence[float], parts: int, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """
    Assign positions of `costs` to `parts` parts of nearly equal sum: longest processing time first (Graham, 1969).

    Args:
        costs (`Sequence[float]`): Cost of each position.
        parts (`int`): Number of parts.
        sizes (`Sequence[int]`, *optional*): How many positions each part takes; as many as it likes by default.

    Example:

    ```python
    >>> from accelerate_unsloth.data.packing import assign_longest_first
    >>> assign_longest_first([9, 1, 4, 5], parts=2)
    [[0, 1], [2, 3]]
    >>> assign_longest_first([9, 1, 1, 1], parts=2, sizes=[2, 2])
    [[0, 3], [1, 2]]
    ```
    """
    room = [len(costs)] * parts if sizes is None else sizes
    assigned = [[] for _ in range(parts)]
    loads = [(0.0, part) for part in range(parts) if room[part]]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, part = heapq.heappop(loads)
        assigned[part].append(position)
        if len(assigned[part]) < room[part]:
            heapq.heappush(loads, (load + costs[position], part))
    return [sorted(part) for part in assigned]


def assign_in_sizes(
    samples: Sequence[int], lengths: Sequence[int], sizes: Sequence[Sequence[int]], cost: RowCost
) -> list[list[list[int]]]:
    """
    Assign an effective batch to micro-batches of given sizes, so that ranks cost nearly the same.

    Args:
        samples (`Sequence[int]`): Indices of the samples.
        lengths (`Sequence[int]`): Tokens of each of them.
        sizes (`Sequence[Sequence[int]]`): Samples of each micro-batch of each rank; together as many as there are.
        cost ([`RowCost`]): What rows cost.

    Returns:
        `list[list[list[int]]]`: samples of each micro-batch of each rank.

    Example:

    ```python
    >>> from accelerate_unsloth.data.packing import RowCost, assign_in_sizes
    >>> assign_in_sizes([5, 6, 7, 8], [90, 10, 20, 30], sizes=[[1, 1], [1, 1]], cost=RowCost())
    [[[5], [6]], [[8], [7]]]
    ```
    """
    if cost.padded:
        return _assign_padded_in_sizes(samples, lengths, sizes)
    costs = [cost.of(length) for length in lengths]
    ranks = []
    for share, of_rank in zip(assign_longest_first(costs, len(sizes), [sum(s) for s in sizes]), sizes, strict=True):
        parts = assign_longest_first([costs[i] for i in share], len(of_rank), of_rank)
        ranks.append([[samples[share[i]] for i in part] for part in parts])
    return ranks


def _assign_padded_in_sizes(samples, lengths, sizes) -> list[list[list[int]]]:
    """Neighbours of the sorted lengths share a micro-batch; the next costliest one goes to the rank with the least."""
    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    left = [sorted(of_rank) for of_rank in sizes]
    loads, ranks, start = [0.0] * len(sizes), [[] for _ in sizes], 0
    while any(left):
        rank = min((rank for rank in range(len(sizes)) if left[rank]), key=loads.__getitem__)
        size = left[rank].pop()
        group, start = ordered[start : start + size], start + size
        loads[rank] += size * lengths[group[0]]
        ranks[rank].append([samples[i] for i in group])
    return ranks


def pack_padded(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """
    Group padded rows into at most `parts` micro-batches, the costliest of which costs as little as possible.

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


def assign_balanced(
    samples: Sequence[int], lengths: Sequence[int], world_size: int, cost: RowCost, token_budget: int
) -> list[list[list[int]]]:
    """
    Assign an effective batch to ranks and micro-batches of nearly equal cost; their numbers of samples may differ.

    Args:
        samples (`Sequence[int]`): Indices of the samples.
        lengths (`Sequence[int]`): Tokens of each of them.
        world_size (`int`): Number of processes.
        cost ([`RowCost`]): What rows cost.
        token_budget (`int`): Most tokens of a micro-batch, padding included; as few as fit are formed.

    Returns:
        `list[list[list[int]]]`: samples of each micro-batch of each rank; none of them is empty.

    Raises:
        ValueError: if one sample alone exceeds the budget.

    Example:

    ```python
    >>> from accelerate_unsloth.data.packing import RowCost, assign_balanced
    >>> assign_balanced([7, 8, 9], [90, 50, 40], world_size=2, cost=RowCost(), token_budget=100)
    [[[7]], [[8, 9]]]
    ```
    """
    if cost.padded:
        return _assign_padded(samples, lengths, world_size, token_budget)
    shares = assign_longest_first([cost.of(length) for length in lengths], world_size)
    return [
        split_micro_batches([samples[i] for i in share], [lengths[i] for i in share], cost, token_budget)
        for share in shares
    ]


def split_micro_batches(
    samples: Sequence[int], lengths: Sequence[int], cost: RowCost, token_budget: int
) -> list[list[int]]:
    """Split one rank's share into as few balanced micro-batches as keep `token_budget`."""
    if cost.padded:
        return _assign_padded(samples, lengths, 1, token_budget)[0]
    costs = [cost.of(length) for length in lengths]
    check_fits(samples, lengths, token_budget)
    count = max(1, -(-sum(lengths) // token_budget))
    parts = assign_longest_first(costs, count)
    # One sample a micro-batch fits in any case, so this ends.
    while any(sum(lengths[i] for i in part) > token_budget for part in parts):
        count += 1
        parts = assign_longest_first(costs, count)
    return [[samples[i] for i in part] for part in parts if part]


def _assign_padded(samples, lengths, world_size: int, token_budget: int) -> list[list[list[int]]]:
    """Micro-batches are formed over all ranks first, because long rows belong together wherever they run."""
    check_fits(samples, lengths, token_budget)  # else no count would be large enough
    count = max(1, -(-sum(lengths) // (world_size * token_budget)))
    while True:
        groups = pack_padded(lengths, world_size * count)
        tokens = [len(group) * lengths[group[0]] for group in groups]
        if max(tokens, default=0) <= token_budget:
            break
        count += 1
    assigned = [[] for _ in range(world_size)]
    # Over the ranks and back, from the costliest micro-batch on, so that each rank gets as many.
    for turn, group in enumerate(sorted(range(len(groups)), key=lambda i: -tokens[i])):
        lap, rank = divmod(turn, world_size)
        assigned[rank if lap % 2 == 0 else world_size - 1 - rank].append([samples[i] for i in groups[group]])
    return assigned


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
