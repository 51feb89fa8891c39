"""What ends a training with a message instead of a traceback."""

from mige.utils.errors import UserError


class TrainingError(UserError, RuntimeError):
    """Training that cannot start or go on; the message says why, what is safe and what to do."""
