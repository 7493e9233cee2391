"""`nestling evaluate`: how well a trained model predicts held-out text, and whether its memory helps."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestling.jobs.arguments import AsJson, Run, RunDir, trained_run
from nestling.jobs.output import WRONG_USAGE, Stop, chatter_to, say, verb


@verb("run_id", "heldout_loss", "heldout_bits_per_byte", "unigram_bits_per_byte", "tokens")
def evaluate(
    run: Run,
    overrides: RunDir = None,
    data: Annotated[str | None, typer.Option(help="Another text than the run's own: a path or embedded:NAME.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to read.")] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Evaluate a trained model on held-out text."""
    folder = trained_run(run, overrides)
    if data is not None:
        _check_source(data)
    say(f"evaluating {folder.run_id} ({folder.name}); Ray's output: {folder.ray_log}")
    with chatter_to(folder.ray_log):
        from nestling.evaluation import evaluate as run_evaluation

        result = run_evaluation(folder, data, tokens)
    if not as_json:
        print("\n".join(_lines(result)))
    return result


def _check_source(source: str) -> None:
    from nestling.data.errors import DataError
    from nestling.data.sources import open_source

    try:
        open_source(source)
    except DataError as error:
        raise Stop(str(error).replace("data.source", "--data", 1), WRONG_USAGE) from error


def _lines(result: dict[str, Any], prefix: str = "") -> list[str]:
    """One line a figure; nested results with dotted names."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix + key:<36}{_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_shown(item) for item in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
