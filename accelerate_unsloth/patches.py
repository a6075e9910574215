"""A log of everything that this package has replaced in other modules, in memory, so that it can be undone."""

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """One replaced attribute, or entry of a mapping: `owner.name` was `original` and is now `replacement`."""

    owner: Any
    name: str
    original: Any
    replacement: Any

    @property
    def had_original(self) -> bool:
        return self.original is not _ABSENT


@dataclass
class PatchLog:
    """Patches in the order they were made."""

    patches: list[Patch] = field(default_factory=list)

    def patch(self, owner: Any, name: str, replacement: Any) -> Patch:
        """Set an attribute, or the entry of a mapping such as `sys.modules`, and return the patch."""
        patch = Patch(owner, name, _slots(owner).get(name, _ABSENT), replacement)
        self.patches.append(patch)
        _set(owner, name, replacement)
        return patch

    def holds(self, owner: Any, name: str) -> bool:
        return any(patch.owner is owner and patch.name == name for patch in self.patches)

    def undo(self, patches: Iterable[Patch] | None = None) -> None:
        """Restore every attribute, or only those of `patches`, in reverse order."""
        chosen = {id(patch) for patch in (self.patches if patches is None else patches)}
        for patch in [patch for patch in reversed(self.patches) if id(patch) in chosen]:
            _set(patch.owner, patch.name, patch.original)
            self.patches = [other for other in self.patches if other is not patch]


@contextmanager
def patched(owner: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of an owner while the body runs."""
    patches = PatchLog()
    for name, replacement in replacements.items():
        patches.patch(owner, name, replacement)
    try:
        yield
    finally:
        patches.undo()


def _slots(owner: Any):
    return owner if isinstance(owner, MutableMapping) else vars(owner)


def _set(owner: Any, name: str, value: Any) -> None:
    """Set an attribute or an entry; `_ABSENT` removes it."""
    if isinstance(owner, MutableMapping):
        if value is _ABSENT:
            owner.pop(name, None)
        else:
            owner[name] = value
    elif value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


patch_log = PatchLog()
