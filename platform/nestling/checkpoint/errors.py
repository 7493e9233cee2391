"""What goes wrong with the files of a run; a module of its own because every other one here raises it."""


class CheckpointError(RuntimeError):
    """A run's files are missing, damaged or do not belong together; the message names them."""


class ResumeError(CheckpointError):
    """A training cannot go on from its checkpoints; all ranks find that together."""
