"""
Secrets out of text: reports and error messages are passed on, and command lines hold tokens.

What may be a secret is hidden by its name (`--hub_token x`, `{"api_key": "x"}`), by its form (`hf_...`), and by its value
if an environment variable with such a name holds it. Hiding too much costs a word, hiding too little an account.
"""

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "HIDDEN"

_SECRET_NAME = re.compile(
    r"token(?!s|iz)|secret|passw|passphr|pwd|credential|auth(?!ors?\b|ors?_|ority)|bearer|cookie|api.?key|(^|[_.-])key$",
    re.IGNORECASE,
)
# Tokens of a vocabulary, such as --pad_token.
_VOCABULARY = re.compile(r"(^|[_.-])(pad|eos|bos|unk|sep|cls|mask|image|stop|new)[_-]?token$", re.IGNORECASE)
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_FORMS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # https://user:password@host
    re.compile(
        r"(?<![A-Za-z0-9])(hf|api_org|ghp|gho|ghs|ghu|glpat|github_pat|sk|pk|rk|xox[a-z]|wandb_v\d)[_-][\w-]{10,}"
    ),
    re.compile(r"(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),  # a JSON web token
    re.compile(r"(?<![A-Za-z0-9])(?=[0-9a-f]*[0-9])[0-9a-f]{40}(?![A-Za-z0-9])"),  # a key of Weights & Biases
)
_PAIR = re.compile(
    # Only where a word begins: a long word without "=" would be searched from each of its letters.
    r"""(?P<name>(?<![\w.-])(--[\w.-]+\s+(?!-)|["']?[\w.-]+["']?\s*[:=]\s*))"""
    r"""(?P<value>"[^"]*"|'[^']*'|((bearer|basic|token)\s+)?[^\s"',;&}]+)""",
    re.IGNORECASE,
)
# Named like secrets, and folders all the same, which texts are full of.
_FOLDERS = {"PWD", "OLDPWD"}
# Shorter values ("1", "true") are no secrets, and would be cut out of unrelated words.
_SHORTEST = 8


def is_secret_name(name: str) -> bool:
    """
    Whether an argument or variable of this name may hold a secret.

    Example:

    ```python
    >>> from accelerate_unsloth.reporting.secrets import is_secret_name
    >>> [is_secret_name(name) for name in ("--hub_token", "WANDB_API_KEY", "--pad_token", "--micro_batch_tokens")]
    [True, True, False, False]
    ```
    """
    name = _CAMEL_HUMP.sub("_", name.strip("\"' :=+-"))
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.search(name)


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """
    Text without what looks like a secret, or is one in the environment.

    Args:
        text (`str`): Any text.
        environment (`Mapping[str, str]`, *optional*): Where known secrets are looked up, by the names of variables.
    """
    environment = os.environ if environment is None else environment
    names = [name for name in environment if is_secret_name(name) and name not in _FOLDERS]
    known = [environment[name] for name in names if len(environment[name]) >= _SHORTEST]
    for value in sorted(known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return text


def command_without_secrets(words: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """
    A command line without the values of its secret arguments.

    Args:
        words (`Sequence[str]`): As in `sys.argv`.
        environment (`Mapping[str, str]`, *optional*): As for [`without_secrets`].

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
    """Also of pairs inside of quoted values."""
    value = f'"{HIDDEN}"' if is_secret_name(pair["name"]) else _PAIR.sub(_hide_value, pair["value"])
    return pair["name"] + value
