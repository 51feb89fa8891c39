"""The base of all errors that a user can mend."""


class UserError(Exception):
    """Its message says what was got, what was expected and what to do; scripts print it as one line."""
