"""
Lets rank 0 write while the other ranks wait, with the file permissions of the user's umask.

Every rank of a plain script calls PEFT's and Unsloth's saving methods, which would write the same files N times.
"""

import functools
import os
from contextlib import suppress
from pathlib import Path
from types import MethodType

from ..launch.channel import channel
from ..launch.topology import topology

# Methods of models and tokenizers that write files or push to the hub.
_FORMATS = ("", "_merged", "_gguf", "_ggml", "_torchao", "_openvino")
_WRITERS = [f"{verb}{form}" for verb in ("save_pretrained", "push_to_hub") for form in _FORMATS]

_writing = False


def write_once(name, write):
    """
    Run `write` on rank 0 while the other ranks wait; return its result there and `None` elsewhere.

    `name` is for messages, the same on all ranks.

    Raises:
        PeerFailure: on the waiting ranks if `write` raised.
    """
    global _writing
    if _writing or topology().world_size == 1:
        return write()
    _writing = True
    try:
        return channel().run_on_main(f"write/{name}", write)
    finally:
        _writing = False


def follow_umask(folder) -> None:
    """
    Give the files of a folder the permissions that the user's umask allows.

    safetensors writes files that only their owner can read (0.8.0, through a temporary file), whatever the umask.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        with suppress(PermissionError):  # another user's file, in a shared folder
            file.chmod(0o666 & ~umask)


def guard(thing) -> None:
    """Let the writing methods of a model or tokenizer run on rank 0 only. Safe to call again after wrapping it."""
    for name in _WRITERS:
        method = getattr(thing, name, None)
        # A PEFT model forwards unknown names to its base model, whose methods are not its own.
        if getattr(method, "__self__", None) is thing and not hasattr(method.__func__, "_writes_once"):
            # A bound method, not a closure over `thing`: a deep copy of the model must save itself.
            setattr(thing, name, MethodType(_once(name, method.__func__), thing))


def _once(name, function):
    @functools.wraps(function)
    def guarded(self, *args, **kwargs):
        def write():
            written = function(self, *args, **kwargs)
            folder = args[0] if args else kwargs.get("save_directory")
            if name.startswith("save_") and folder:  # a folder, and not a name on the hub
                follow_umask(folder)
            return written

        return write_once(name, write)

    guarded._writes_once = True
    return guarded
