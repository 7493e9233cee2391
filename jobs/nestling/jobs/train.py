"""`nestling train`: from a job file to a trained model in the runs folder."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict
from typing import Any

from nestling.config import JobConfig, load
from nestling.jobs.arguments import AsJson, Job, Overrides, place_of
from nestling.jobs.evaluate import report
from nestling.jobs.output import FAILED, INTERRUPTED, WRONG_USAGE, Stop, chatter_to, describe, in_columns, say, verb
from nestling.jobs.progress import TrainingProgress
from nestling.tracking.runs import RunBusyError, RunFolder

KEYS = (
    *("run_id", "status", "steps", "tokens", "train_loss", "heldout_bits_per_byte", "unigram_bits_per_byte"),
    *("tokens_per_second", "checkpoint", "run_dir", "tracking_uri", "skipped_steps", "data"),
)


@verb(*KEYS)
def train(job: Job, overrides: Overrides = None, as_json: AsJson = False) -> dict[str, Any]:
    """Train a model: JOB, with any of its keys changed."""
    config = load(job, overrides or (), streamed=False)
    try:
        folder = RunFolder.create(config.run.dir, config.run.name)
    except OSError as error:
        raise Stop(f"run.dir: cannot make a run in {config.run.dir}: {error}", WRONG_USAGE) from error
    return run(config, folder, as_json)


def run(config: JobConfig, folder: RunFolder, as_json: bool) -> dict[str, Any]:
    """Train a job in its folder, from its newest checkpoint if it has one, and tell the person how it goes and ends."""
    from nestling.training import fit  # torch takes seconds: not before the configuration is known to be right

    say(f"run {folder.run_id} in {folder.path}; Ray's and DeepSpeed's output: {folder.ray_log}")
    try:
        with chatter_to(folder.ray_log), TrainingProgress(config.training) as progress:
            summary = asdict(fit(config, folder, progress, progress.event))
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    except KeyboardInterrupt as error:
        raise _stop(folder, "interrupted", INTERRUPTED) from error
    except Exception as error:
        with folder.ray_log.open("a") as file:
            traceback.print_exception(error, file=file)
        raise _stop(folder, f"failed: {describe(error)}", FAILED) from error
    if not as_json:
        print(_report(summary, folder, config))
    return summary


def _stop(folder: RunFolder, how: str, code: int) -> Stop:
    """The end of a run that did not finish; how far it came is in its log."""
    info = {"run_dir": folder.path} | folder.reached()
    saved = f", saved in {info['checkpoint']}" if info.get("checkpoint") else ""
    lines = [f"run {folder.run_id} {how}{saved}", f"log: {folder.ray_log}"]
    if folder.config.exists():
        lines.append(f"go on: nestling resume {folder.run_id}{place_of(folder)}")
    return Stop("\n".join(lines), code, {key: info.get(key) for key in KEYS})


def _report(summary: dict[str, Any], folder: RunFolder, config: JobConfig) -> str:
    place = place_of(folder)
    rate = summary["tokens_per_second"]  # None where there was nothing left to train
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    lines = {
        "run": f"{folder.run_id} ({folder.name}), {summary['steps']:,} steps, {summary['tokens']:,} tokens{speed}",
        **report(json.loads(folder.evaluation.read_text())),
        "data": summary["data"],
        "folder": str(folder.path),
        "saved": str(summary["checkpoint"]),
        "log": str(folder.ray_log),
        "curves": f"{folder.figure}, or in MLflow: nestling ui{place}",
        "sample": f'nestling generate {folder.run_id} --prompt "The "{place}',
    }
    return in_columns(lines)
