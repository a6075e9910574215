"""
Balanced assignment of samples of uneven length to ranks and micro-batches, so that no rank waits for a long row.

Without padding a row costs its tokens, plus attention that grows with the square of its length. A padded row costs as
much as the longest of its micro-batch. Every rank computes the same assignment, without communication.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# Below it a micro-batch takes about as long as its kernel launches: measured for 1B and 8B dims on an H200.
LAUNCH_BOUND_TOKENS = 4096


@dataclass(frozen=True)
class RowCost:
    """The cost of a sample, in units of the cost of a token's linear layers."""

    padded: bool = False  # whether rows of a micro-batch are padded to its longest
    attention_per_token: float = 0.0  # cost of one token's attention to one other token of its row

    def of(self, length: int) -> float:
        return length * (1.0 + self.attention_per_token * length)

    def tokens(self, lengths: Sequence[int]) -> int:
        """Count the tokens of a micro-batch of these rows, padding included."""
        return len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)


def assign_longest_first(costs: Sequence[float], parts: int, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """
    Assign positions of `costs` to `parts` parts of nearly equal sum: longest processing time first (Graham, 1969).

    The costliest remaining position goes to the part with the lowest sum. `sizes` limits the positions of each part.

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

    `sizes[rank][micro_batch]` are the numbers of samples, together as many as there are; the result is
    `[rank][micro_batch] -> samples`.

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
    """Fill micro-batches in the order of descending length, always for the rank with the lowest cost so far."""
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
    Group padded rows into at most `parts` micro-batches, so that the costliest one costs as little as possible.

    A micro-batch costs its number of rows times its longest row. It therefore takes neighbors of the sorted lengths:
    many short rows, or few long ones. The smallest cap on that cost with which `parts` suffice is found by bisection.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    sizes = [max(1, lengths[i]) for i in ordered]

    def starts(cap: int) -> list[int]:
        """Return where each micro-batch begins in the order of descending length."""
        found, start = [], 0
        while start < len(sizes):
            found.append(start)
            start += max(1, cap // sizes[start])
        return found

    longest = max(sizes, default=1)
    low, high = max(longest, sum(sizes) // parts), longest * max(1, len(sizes))
    while low < high:
        cap = (low + high) // 2
        low, high = (low, cap) if len(starts(cap)) <= parts else (cap + 1, high)
    return [ordered[start:end] for start, end in itertools.pairwise([*starts(low), len(sizes)])]


def assign_balanced(
    samples: Sequence[int], lengths: Sequence[int], world_size: int, cost: RowCost, token_budget: int
) -> list[list[list[int]]]:
    """
    Assign an effective batch to ranks and micro-batches of nearly equal cost; their numbers of samples may differ.

    `token_budget` is the most tokens of a micro-batch, padding included. As few micro-batches as possible are formed, or
    more where that saves enough padding. The result is `[rank][micro_batch] -> samples`, without empty micro-batches. A
    sample above the budget is a `ValueError`.

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
    # One sample per micro-batch always fits, so this loop ends.
    while any(sum(lengths[i] for i in part) > token_budget for part in parts):
        count += 1
        parts = assign_longest_first(costs, count)
    return [[samples[i] for i in part] for part in parts if part]


def _assign_padded(samples, lengths, world_size: int, token_budget: int) -> list[list[list[int]]]:
    """
    Form micro-batches of similar lengths over all ranks, and assign them to ranks.

    More of them have less padding, but below `LAUNCH_BOUND_TOKENS` each takes the same time. Of some counts, from the fewest
    that keep the budget on, the one is taken with which the slowest rank takes the shortest time.
    """
    check_fits(samples, lengths, token_budget)  # else no count would be large enough
    count, best = max(1, -(-sum(lengths) // (world_size * token_budget))), None
    while True:
        groups = sorted(pack_padded(lengths, world_size * count), key=lambda group: -len(group) * lengths[group[0]])
        tokens = [len(group) * lengths[group[0]] for group in groups]
        largest = max(tokens, default=0)
        if largest <= token_budget:
            times = [max(of_group, LAUNCH_BOUND_TOKENS) for of_group in tokens]
            # Among ranks with the same time, the one with the fewest tokens comes first.
            costs = [time + of_group * 2**-30 for time, of_group in zip(times, tokens, strict=True)]
            assigned = assign_longest_first(costs, world_size)
            slowest = max(sum(times[i] for i in of_rank) for of_rank in assigned)
            if best is None or slowest < best[0]:
                best = slowest, [[[samples[i] for i in groups[number]] for number in of_rank] for of_rank in assigned]
            if largest <= LAUNCH_BOUND_TOKENS or world_size * count >= len(lengths):
                return best[1]
        count = max(count + 1, count * 5 // 4)


def check_fits(samples: Sequence[int], lengths: Sequence[int], token_budget: int) -> None:
    """Raise `ValueError` if one sample alone exceeds the budget."""
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise ValueError(
            f"Sample {samples[list(lengths).index(longest)]} has {longest} tokens, and a micro-batch may hold "
            f"{token_budget}. Lower max_length to {token_budget} or less, or raise micro_batch_tokens if you set it."
        )
