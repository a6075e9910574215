"""The list of everything this library has changed in other modules' memory, so that it can be undone."""

from dataclasses import dataclass, field
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """One replaced attribute: `owner.name` was `original` and is now `replacement`."""

    owner: Any
    name: str
    original: Any
    replacement: Any


@dataclass
class Ledger:
    """
    Patches in the order they were made.

    Example:

    ```python
    >>> import math
    >>> from accelerate_unsloth.ledger import Ledger
    >>> ledger = Ledger()
    >>> ledger.patch(math, "tau", 6)
    >>> ledger.undo()
    >>> round(math.tau, 2)
    6.28
    ```
    """

    patches: list[Patch] = field(default_factory=list)

    def patch(self, owner: Any, name: str, replacement: Any) -> None:
        """Set `owner.name`, and remember what it was on the owner itself (not on its class)."""
        self.patches.append(Patch(owner, name, vars(owner).get(name, _ABSENT), replacement))
        setattr(owner, name, replacement)

    def holds(self, owner: Any, name: str) -> bool:
        return any(patch.owner is owner and patch.name == name for patch in self.patches)

    def undo(self) -> None:
        """Restore every attribute, last patch first."""
        while self.patches:
            patch = self.patches.pop()
            if patch.original is _ABSENT:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.original)


ledger = Ledger()
