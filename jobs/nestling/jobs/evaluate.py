"""`nestling evaluate`: how well a trained model predicts held-out text, and whether its memory helps."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any

import typer

from nestling.config import EvaluationConfig
from nestling.jobs.arguments import AsJson, Fast, Run, for_reading, job_for_reading, say_fast, trained_run
from nestling.jobs.output import FAILED, WRONG_USAGE, Stop, chatter_to, in_columns, say, verb

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="run.dir, data.column, evaluation.final_tokens, or continuum.drive and its settings.",
        show_default=False,
    ),
]


@verb("run_id", "heldout_loss", "heldout_bits_per_byte", "unigram_bits_per_byte", "tokens")
def evaluate(
    run: Run,
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Another text than the run's own: a path or embedded:NAME.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to read.")] = None,
    fast: Fast = True,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Evaluate a trained model on held-out text."""
    evaluation = (f"evaluation.{field.name}" for field in fields(EvaluationConfig))
    places, changes = for_reading(overrides, "data.column", *evaluation)
    folder = trained_run(run, places)
    column = continuum = None
    if changes:
        config = job_for_reading(folder, changes)
        tokens, column, continuum = tokens or config.evaluation.final_tokens, config.data.column, config.continuum
    if data is not None:
        _check_source(data)
    say(f"evaluating {folder.run_id} ({folder.name}); Ray's output: {folder.ray_log}")
    with chatter_to(folder.ray_log):
        from nestling.evaluation import evaluate as run_evaluation

        result = run_evaluation(folder, source=data, tokens=tokens, column=column, continuum=continuum, fast=fast)
    say_fast(result["fast_state"])
    if not math.isfinite(result["heldout_loss"]) and result["levels_still_bits_per_byte"] is not None:
        raise Stop("the levels diverged while they read: lower continuum.rates", FAILED)
    if not as_json:
        print(in_columns(report(result)))
    return result


def _check_source(source: str) -> None:
    from nestling.data.errors import DataError
    from nestling.data.sources import check_source

    try:
        check_source(source, key="--data")
    except DataError as error:
        raise Stop(str(error), WRONG_USAGE) from error


def report(figures: dict[str, Any]) -> dict[str, str]:
    """An evaluation in words, a line a question; `train` ends with the same lines."""
    heldout = figures["heldout_bits_per_byte"]
    lines = {
        "held-out": f"{heldout:.3f} bits per byte over {figures['tokens']:,} tokens; "
        f"unigram entropy (the chance line): {figures['unigram_bits_per_byte']:.3f}",
        "position": " ".join(f"{bits:.2f}" for bits in figures["bits_per_byte_by_position"])
        + " bits per byte, from the first to the last eighth of a sequence",
    }
    if figures.get("parts"):
        parts = (f"{name} {part['heldout_bits_per_byte']:.3f}" for name, part in figures["parts"].items())
        lines["parts"] = ", ".join(parts) + " bits per byte"
    if figures["writes_off_bits_per_byte"] is not None:
        on, off = figures["writes_on_bits_per_byte"], figures["writes_off_bits_per_byte"]
        lines["memory"] = (
            f"{on:.3f} with the memories' writes, {off:.3f} with them switched off ({off - on:+.3f}), "
            f"over {figures['control_tokens']:,} tokens"
        )
        gates = ((", ".join(f"{value:.3f}" for value in figures[name])) for name in ("eta", "alpha"))
        lines["gates"] = "mean eta {}; mean alpha {} (layer by layer)".format(*gates)
    if figures.get("levels_still_bits_per_byte") is not None:
        moving, still = figures["levels_moving_bits_per_byte"], figures["levels_still_bits_per_byte"]
        lines["levels"] = (
            f"{moving:.3f} with levels that move while they read, {still:.3f} with levels that stay "
            f"({still - moving:+.3f}), over {figures['control_tokens']:,} tokens"
        )
    if figures["second_copy_bits_per_byte"] is None:
        lines["recall"] = "not measured: the held-out text is too short for two passages"
    else:
        again, other = figures["second_copy_bits_per_byte"], figures["after_another_bits_per_byte"]
        lines["recall"] = f"{again:.3f} for a passage read again, {other:.3f} after another one ({other - again:+.3f})"
    return lines
