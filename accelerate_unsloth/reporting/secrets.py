"""
Hide secrets in text that leaves this process: reports, error messages, command lines.

A value is hidden if its argument is named like a secret (`--hub_token x`, `{"api_key": "x"}`), if an environment variable
that is named like a secret holds it, or if it is a Hugging Face token or the user and password of a URL.
"""

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "HIDDEN"

_SECRET_NAME = re.compile(
    r"token(?!s|iz)|secret|passw|passphr|pwd|credential|auth(?!ors?\b|ors?_|ority)|bearer|cookie|"
    r"(api|access|private).?key|(^|[_.-])key$",
    re.IGNORECASE,
)
# Tokens of a vocabulary, such as --pad_token.
_VOCABULARY = re.compile(r"(^|[_.-])(pad|eos|bos|unk|sep|cls|mask|image|stop|new)[_-]?token$", re.IGNORECASE)
_PLAIN_VALUES = re.compile(r"(?<=://)[^/\s@]+(?=@)|(?<![A-Za-z0-9])hf_[A-Za-z0-9]{10,}")
_PAIR = re.compile(
    # Only where a word begins: a long word without "=" would be searched from each of its letters.
    r"""(?P<name>(?<![\w.-])(--[\w.-]+\s+(?!-)|["']?[\w.-]+["']?\s*[:=]\s*))"""
    r"""(?P<value>"[^"]*"|'[^']*'|((bearer|basic|token)\s+)?[^\s"',;&}]+)""",
    re.IGNORECASE,
)
_FOLDERS = {"PWD", "OLDPWD"}  # named like secrets
_SHORTEST = 8  # characters of a secret; shorter values ("1", "true") would be cut out of unrelated words


def is_secret_name(name: str) -> bool:
    """
    Return whether an argument or variable of this name may hold a secret.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.secrets import is_secret_name
    >>> [is_secret_name(name) for name in ("--hub_token", "WANDB_API_KEY", "--pad_token", "--micro_batch_tokens")]
    [True, True, False, False]
    ```
    """
    name = name.strip("\"' :=+-")
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.search(name)


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return `text` without the values of secret variables of `environment` (by default this process's)."""
    environment = os.environ if environment is None else environment
    known = [value for name, value in environment.items() if is_secret_name(name) and name not in _FOLDERS]
    for value in sorted(known, key=len, reverse=True):  # one may be a part of another
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _PLAIN_VALUES.sub(HIDDEN, text)


def command_without_secrets(words: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """
    Return a command line, as in `sys.argv`, without the values of its secret arguments.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.secrets import command_without_secrets
    >>> command_without_secrets(["train.py", "--hub_token", "abc", "--lr=1e-4", "--api-key=xyz"])
    ['train.py', '--hub_token', 'HIDDEN', '--lr=1e-4', '--api-key=HIDDEN']
    ```
    """
    clean, follows_secret_flag = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if follows_secret_flag and not word.startswith("--"):
            clean.append(HIDDEN)
        elif equals and is_secret_name(name):
            clean.append(f"{name}={HIDDEN}")
        else:
            clean.append(without_secrets(_PAIR.sub(_hide_value, word), environment))
        follows_secret_flag = word.startswith("-") and not equals and is_secret_name(word)
    return clean


def _hide_value(pair: re.Match) -> str:
    """Hide the value of a secret name, also of pairs inside of a quoted value."""
    value = f'"{HIDDEN}"' if is_secret_name(pair["name"]) else _PAIR.sub(_hide_value, pair["value"])
    return pair["name"] + value
