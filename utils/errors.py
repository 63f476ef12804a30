"""The base class of every error that a user can fix, and text that is safe to print."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # and what reverses the direction


class UserError(ValueError):
    """A problem with an option, a file or a machine; the message says what, where, and what to do."""


def visible(text: str) -> str:
    """A text from a file or a path, in which characters that would control the terminal are spelt out."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
