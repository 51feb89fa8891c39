"""What ends a training with a message instead of a traceback."""

from mige.utils.errors import UserError


class TrainingError(UserError, RuntimeError):
    """Training that cannot start or resume; the message says why, what is safe and what to do."""
