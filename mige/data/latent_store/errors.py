"""What is raised for a store of moments."""

from mige.utils.errors import UserError


class StoreError(UserError, ValueError):
    """A store that cannot be used; the message names it, what was got and expected, and what to do."""
