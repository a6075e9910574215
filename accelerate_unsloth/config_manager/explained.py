"""Options that say where they come from."""

from collections.abc import Mapping
from typing import Any


class ExplainedConfig(dict):
    """
    Options as `enable_multi_gpu(**config)` takes them, and what they were worked out from.

    Args:
        options (`Mapping[str, Any]`):
            The options.
        assumptions (`Mapping[str, str]`):
            By subject, what was assumed and decided, in words.
    """

    def __init__(self, options: Mapping[str, Any], assumptions: Mapping[str, str]):
        super().__init__(options)
        self.assumptions = dict(assumptions)

    def explain(self) -> str:
        """One line for each assumption."""
        return "\n".join(f"{subject}: {said}" for subject, said in self.assumptions.items())
