"""The one error a user is meant to read."""


class UserError(ValueError):
    """A mistake the user can mend: printed without a traceback, exit code 2.

    The message says where (file, key or rank), what was found, what was expected and what to try.
    """
