"""What is raised for weight files."""


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message names the file, every key at fault and what to do."""
