"""`nestling train`: from a job file to a trained model in the runs folder."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
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
    return run(config, new_folder(config), as_json)


def new_folder(config: JobConfig) -> RunFolder:
    """The folder of a run that is about to begin."""
    try:
        return RunFolder.create(config.run.dir, config.run.name)
    except OSError as error:
        raise Stop(f"run.dir: cannot make a run in {config.run.dir}: {error}", WRONG_USAGE) from error


def run(config: JobConfig, folder: RunFolder, as_json: bool) -> dict[str, Any]:
    """Train a job in its folder, from its newest checkpoint if it has one, and tell the person how it goes and ends."""

    def work(progress: TrainingProgress) -> Any:
        from nestling.training import fit  # torch takes seconds: not before the configuration is known to be right

        return fit(config, folder, progress, progress.event)

    summary = attend(config, folder, work, KEYS, "resume")
    if not as_json:
        print(_report(summary, folder, config))
    return summary


def attend(
    config: JobConfig, folder: RunFolder, work: Callable[[TrainingProgress], Any], keys: Iterable[str], again: str
) -> dict[str, Any]:
    """Do the work of a run while the person sees how it goes; its summary, or a Stop that says how to go on.

    Args:
        work: gets what shows the progress, returns a dataclass.
        keys: what of the run is known in the JSON if it does not end well.
        again: the verb, with its options, that goes on with the run.
    """
    say(f"run {folder.run_id} in {folder.path}; Ray's and DeepSpeed's output: {folder.ray_log}")
    try:
        with chatter_to(folder.ray_log), TrainingProgress(config.training) as progress:
            return asdict(work(progress))
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    except KeyboardInterrupt as error:
        raise _stop(folder, "interrupted", INTERRUPTED, keys, again) from error
    except Exception as error:
        with folder.ray_log.open("a") as file:
            traceback.print_exception(error, file=file)
        raise _stop(folder, f"failed: {describe(error)}", FAILED, keys, again) from error


def _stop(folder: RunFolder, how: str, code: int, keys: Iterable[str], again: str) -> Stop:
    """The end of a run that did not finish; how far it came is in its log."""
    info = {"run_dir": folder.path} | folder.reached()
    saved = f", saved in {info['checkpoint']}" if info.get("checkpoint") else ""
    lines = [f"run {folder.run_id} {how}{saved}", f"log: {folder.ray_log}"]
    if folder.config.exists():
        lines.append(f"go on: nestling {again} {folder.run_id}{place_of(folder)}")
    return Stop("\n".join(lines), code, {key: info.get(key) for key in keys})


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
