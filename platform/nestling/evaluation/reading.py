"""The model as a run reads with it: with levels that move, or with the fast state that `nestling learn --fast` left."""

from __future__ import annotations

import logging

import torch

from nestling.checkpoint.fast import FastState, weights_sha256
from nestling.config import ConfigError
from nestling.evaluation.heldout import Reader
from nestling.models.config import ContinuumConfig
from nestling.models.continuum import with_moving_levels
from nestling.models.fast_state import Primed, filled
from nestling.models.skeleton import LanguageModel
from nestling.tracking import RunFolder

log = logging.getLogger(__name__)


def reading_model(
    folder: RunFolder, model: LanguageModel, continuum: ContinuumConfig, fast: bool = True
) -> tuple[Reader, FastState | None]:
    """The model of a run, to read texts with, and the fast state with which each text begins (None: with none).

    Args:
        model: with the run's newest weights, see `load_final`.
        fast: whether to take the fast state that the run keeps. One of other weights is left out, and that is said.

    Raises:
        ConfigError: there is a fast state, and levels are to move while the model reads.
        CheckpointError: the fast state is damaged.
    """
    kept = FastState.load(folder) if fast else None
    if kept is not None and kept.weights_sha256 != weights_sha256(model):
        log.warning(
            "the fast state of run %s belongs to the weights of step %d, which have moved on: it is not used; "
            "nestling forget %s --fast removes it",
            *(folder.run_id, kept.step, folder.run_id),
        )
        kept = None
    if kept is None:
        return with_moving_levels(model, continuum), None
    if continuum.drive != "schedule":
        raise ConfigError(
            f"continuum.drive: got {continuum.drive}, but run {folder.run_id} has a fast state, which was read with "
            f"levels that stay; choose continuum.drive=schedule, or leave the fast state out (--no-fast)"
        )
    with torch.no_grad():
        _, form = model(torch.zeros(1, 1, dtype=torch.int64))  # the form of a state is what comes of a token
    return Primed(model, filled(form, kept.tensors, kept.numbers)), kept
