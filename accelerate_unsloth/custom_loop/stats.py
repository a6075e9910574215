"""What an epoch of a loop of one's own came to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankShare:
    """
    What one rank did in an epoch.

    Args:
        num_tokens (`int`): Tokens of its micro-batches, padding left out where a mask tells it.
        num_samples (`int`): Samples of them.
        work_s (`float`): Seconds of its own forwards and backwards.
    """

    num_tokens: int
    num_samples: int
    work_s: float


@dataclass(frozen=True)
class EpochStats:
    """
    What an epoch came to, the same on every rank.

    Args:
        loss (`float`): Of all steps: their mean over tokens for `TOKEN_MEAN`, else over steps.
        num_tokens (`int`): Tokens of all ranks.
        num_samples (`int`): Samples of all ranks.
        num_steps (`int`): Optimizer steps.
        elapsed_s (`float`): Seconds, data loading included.
        ranks (`tuple[RankShare]`): The share of each rank.
    """

    loss: float
    num_tokens: int
    num_samples: int
    num_steps: int
    elapsed_s: float
    ranks: tuple[RankShare, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.elapsed_s

    @property
    def token_imbalance(self) -> float:
        """Tokens of the rank with the most over the mean."""
        most = max(rank.num_tokens for rank in self.ranks)
        return most * len(self.ranks) / max(1, self.num_tokens)
