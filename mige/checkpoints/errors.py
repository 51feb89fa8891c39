"""What is raised for weight files."""

from mige.utils.errors import UserError


class CheckpointError(UserError, ValueError):
    """A weight file that cannot be used; the message names the file, every key at fault and what to do."""
