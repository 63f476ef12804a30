"""The base class of every error that a user can fix."""


class UserError(ValueError):
    """A problem with an option, a file or a machine; the message says what, where, and what to do."""
