"""One line of the report."""

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """
    What was looked at, what was found, and what to do about it.

    Args:
        subject (`str`): Such as `"torch"` or `"GPU 0"`.
        value (`str`): What was found.
        verdict (`str`, *optional*, defaults to `"ok"`):
            `"ok"`; `"note"` for what is worth knowing; `"problem"` if training cannot work.
        remedy (`str`, *optional*, defaults to `""`): What to do, where something can be done.
    """

    subject: str
    value: str
    verdict: str = OK
    remedy: str = ""
