"""What goes wrong with the files of a run; a module of its own because every other one here raises it."""


class CheckpointError(RuntimeError):
    """A run's files are missing, damaged or do not belong together; the message names them."""
