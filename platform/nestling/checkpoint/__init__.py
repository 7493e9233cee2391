"""What a run leaves behind: checkpoints to go on from, and the weights, configuration and tokenizer at its end.

`pieces` cuts tensors so that any world size reads what any other wrote, `saver` writes a rank's share and commits in
a thread, `store` finds, checks, opens and removes checkpoints; `final` gives a model back from a finished run.
"""

from nestling.checkpoint.errors import CheckpointError, ResumeError
from nestling.checkpoint.final import (
    export_weights,
    load_final,
    newest_good,
    open_weights,
    run_store,
    trained_step,
    write_weights,
)
from nestling.checkpoint.grown import grown
from nestling.checkpoint.manifest import Checkpoint
from nestling.checkpoint.pieces import BUCKET, WEIGHT, Piece, Pieces, write_pieces
from nestling.checkpoint.saver import Saver
from nestling.checkpoint.store import OpenCheckpoint, Store

__all__ = [
    "BUCKET",
    "WEIGHT",
    "Checkpoint",
    "CheckpointError",
    "OpenCheckpoint",
    "Piece",
    "Pieces",
    "ResumeError",
    "Saver",
    "Store",
    "export_weights",
    "grown",
    "load_final",
    "newest_good",
    "open_weights",
    "run_store",
    "trained_step",
    "write_pieces",
    "write_weights",
]
