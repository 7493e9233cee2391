"""Evaluate a finished run on its own held-out text, or on the held-out part of any other source."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from nestling.checkpoint import load_final
from nestling.data import DataError, prepare
from nestling.evaluation.heldout import heldout_report
from nestling.evaluation.reading import reading_model
from nestling.models.config import ContinuumConfig
from nestling.tracking import RunFolder


def evaluate(
    folder: RunFolder,
    source: str | None = None,
    tokens: int | None = None,
    column: str | None = None,
    continuum: ContinuumConfig | None = None,
    fast: bool = False,
) -> dict[str, Any]:
    """Figures of `Report` and the run's id, on this machine and without Ray unless a new source must be read.

    Args:
        folder: a finished run.
        source: as `data.source`; None: the source or the mix that the run was trained on.
        tokens: held-out tokens at most; None: the job's `evaluation.final_tokens`. With none of these arguments
            it is the evaluation of the run's end, and its figures replace `evaluation.json`.
        column: as `data.column`, for a `source`; None: that of the run.
        continuum: how levels move while the text is read; None: as in the run's job.
        fast: whether every sequence begins with the fast state that `nestling learn --fast` has left, if there is one;
            `fast_state` names its documents then, and is None otherwise.

    Raises:
        CheckpointError, DataError: what is missing, and how to fix it.
    """
    if source is None and folder.is_stream:
        raise DataError(
            f"run {folder.run_id} has learnt from a stream and has no held-out text but its probes (nestling status); "
            "name a text to evaluate on, for example --data embedded:english"
        )
    model, _, config = load_final(folder)
    data = config.data
    if source is not None:
        data = replace(data, source=source, mix=None, column=column or data.column)
    data = replace(data, tokenizer=str(folder.tokenizer))
    torch.set_num_threads(1)
    corpus = prepare(data, folder.path.parent / "cache")
    reader, kept = reading_model(folder, model, continuum or config.continuum, fast)
    report = heldout_report(reader, corpus, config, tokens or config.evaluation.final_tokens)
    read = data.source if data.mix is None else ", ".join(part.source for part in data.mix)
    figures = {
        "run_id": folder.run_id,
        "source": read,
        **report.as_dict(),
        "fast_state": kept.names if kept else None,
    }
    if source is None and tokens is None and continuum is None and kept is None:
        folder.evaluation.write_text(json.dumps(figures, indent=2) + "\n")
    return figures
