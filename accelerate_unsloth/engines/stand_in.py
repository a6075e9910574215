"""
What `import unsloth` gives a script that stays as it is, in a process that the reference engine serves.

Unsloth itself cannot be imported without a GPU. This module has the names of it that the reference engine can keep, and
refuses the others with words.
"""

from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType

from .reference import LOADERS


def is_bfloat16_supported() -> bool:
    """True: PyTorch computes in bfloat16 on every CPU, if slowly, while float16 training needs a GPU."""
    return True


_NAMES = {
    **LOADERS,
    "is_bfloat16_supported": is_bfloat16_supported,
    "is_bf16_supported": is_bfloat16_supported,
}

_REFUSAL = (
    f"This process uses the reference engine (transformers and PEFT), in which `unsloth` has {', '.join(_NAMES)} and "
    "nothing else. Leave the other names out for this run, or run on a machine with a GPU, where `unsloth` is Unsloth."
)


class _NoSubmodules(list):
    """A package's search path that ends the search for a submodule with words."""

    def __iter__(self):
        raise ImportError(_REFUSAL)


def make_module() -> ModuleType:
    """
    A module for `sys.modules["unsloth"]`.

    Example:

    ```python
    >>> from accelerate_unsloth.engines import stand_in
    >>> stand_in.make_module().FastLanguageModel.__module__
    'accelerate_unsloth.engines.reference'
    ```
    """
    module = ModuleType("unsloth", __doc__)
    module.__spec__ = ModuleSpec("unsloth", None, origin=__file__, is_package=True)
    module.__path__ = _NoSubmodules()
    module.__version__ = version("unsloth")
    vars(module).update(_NAMES)
    return module
