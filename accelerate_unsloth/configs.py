"""The accelerate configuration files that come with the library."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder() -> Path:
    """Where the files are: inside the installed package, or beside it in a checkout."""
    installed = _PACKAGE / "accelerate_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "accelerate_configs"


def names() -> list[str]:
    return sorted(file.stem for file in folder().glob("*.yaml"))


def path(name: str) -> Path:
    """
    The file of one configuration.

    Args:
        name (`str`): Its name, with or without `.yaml`.

    Raises:
        ValueError: if there is no such configuration.

    Example:

    ```python
    >>> from accelerate_unsloth import configs
    >>> configs.path("unsloth_ddp").name
    'unsloth_ddp.yaml'
    ```
    """
    file = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if file.stem not in names():
        raise ValueError(f"There is no configuration {name!r}; choose one of {', '.join(names())}.")
    return file
