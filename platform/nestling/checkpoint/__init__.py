"""What a run leaves behind: weights, configuration and tokenizer in its folder, and a model back from them."""

from nestling.checkpoint.final import CheckpointError, load_final, save_weights

__all__ = ["CheckpointError", "load_final", "save_weights"]
