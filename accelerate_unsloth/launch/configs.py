"""The accelerate configuration files that come with the library."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Return the folder of the files: inside the installed package, or next to it in a checkout."""
    installed = _PACKAGE / "accelerate_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "accelerate_configs"


def names() -> list[str]:
    return sorted(file.stem for file in folder().glob("*.yaml"))


def path(name: str) -> Path:
    """Return the file of one configuration, named with or without `.yaml`; raise `ValueError` if there is none."""
    file = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if file.stem not in names():
        raise ValueError(f"There is no configuration {name!r}; choose one of {', '.join(names())}.")
    return file


def launcher(name: str, num_processes: int, port: int = 0) -> list[str]:
    """Return Python's arguments for `accelerate launch` with a bundled file; port 0 uses a free one."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(path(name))]
    words += ["--num_processes", str(num_processes)]
    return words if num_processes == 1 else [*words, "--main_process_port", str(port)]
