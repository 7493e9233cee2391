"""`nestling stream`: learn from data without end, go on where a stream stands, or prove that nothing was lost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestling.config import JobConfig, load
from nestling.jobs.arguments import AsJson, found_run, place_of
from nestling.jobs.output import FAILED, WRONG_USAGE, Stop, in_columns, verb
from nestling.jobs.progress import TrainingProgress
from nestling.jobs.train import attend, new_folder
from nestling.tracking.runs import RunFolder

KEYS = (
    *("run_id", "status", "steps", "tokens", "prequential_bits_per_byte", "ledger", "dead_letter", "dead_letters"),
    *("records", "windows", "tokens_per_second", "train_loss", "checkpoint", "run_dir", "tracking_uri"),
    *("ok", "intervals", "gaps", "overlaps"),
)


@verb(*KEYS)
def stream(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="JOB [KEY=VALUE]",
            help="A job file, or the name of one in ./jobs, and keys of it to change.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="RUN", help="Go on with a stream.")] = None,
    check: Annotated[
        str | None, typer.Option("--verify", metavar="RUN", help="Prove from the ledger that nothing was lost.")
    ] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Learn from a stream: a growing folder, a Kafka topic, a Python function, or embedded:five-domains."""
    given = list(arguments or ())
    if resume is not None and check is not None:
        raise Stop("--resume and --verify: give one of them", WRONG_USAGE)
    if check is not None:
        return _verify(_stream_run(check, given), as_json)
    if resume is not None:
        places = [override for override in given if override.startswith("run.dir=")]
        folder = _stream_run(resume, places)
        from nestling.training.resume import resumed_job  # torch takes seconds

        config = resumed_job(folder, [override for override in given if override not in places])
        return _run(config, folder, as_json)
    if not given:
        raise Stop("needs a JOB, or --resume RUN or --verify RUN; nestling stream --help", WRONG_USAGE)
    config = load(given[0], given[1:], streamed=True)
    folder = new_folder(config)
    folder.update(kind="stream")
    return _run(config, folder, as_json)


def _stream_run(reference: str, overrides: list[str]) -> RunFolder:
    folder = found_run(reference, overrides)
    if not folder.is_stream:
        raise Stop(
            f"run {folder.run_id} ({folder.name}) is no stream; nestling resume goes on with a training", WRONG_USAGE
        )
    return folder


def _run(config: JobConfig, folder: RunFolder, as_json: bool) -> dict[str, Any]:
    """Learn from a job's stream in its folder, and tell the person how it goes and ends."""

    def work(progress: TrainingProgress) -> Any:
        from nestling.training.stream import learn_stream

        return learn_stream(config, folder, progress, progress.event)

    summary = attend(config, folder, work, KEYS, "stream --resume")
    if not as_json:
        print(_report(summary, folder))
    return summary


def _report(summary: dict[str, Any], folder: RunFolder) -> str:
    place, rate, bits = place_of(folder), summary["tokens_per_second"], summary["prequential_bits_per_byte"]
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    broken = f", {summary['dead_letters']:,} broken: {summary['dead_letter']}" if summary["dead_letters"] else ""
    return in_columns(
        {
            "run": f"{folder.run_id} ({folder.name}), {summary['steps']:,} steps, {summary['tokens']:,} tokens{speed}",
            "loss": "nothing was read" if bits is None else f"{bits:.3f} bits per byte before learning (prequential)",
            "records": f"{summary['records']:,} in {summary['windows']:,} windows{broken}",
            "ledger": summary["ledger"],
            "folder": str(folder.path),
            "curves": f"{folder.figure}, or in MLflow: nestling ui{place}",
            "saved": str(summary["checkpoint"]),
            "log": str(folder.ray_log),
            "go on": f"nestling stream --resume {folder.run_id}{place}",
        }
    )


def _verify(folder: RunFolder, as_json: bool) -> dict[str, Any]:
    from nestling.training.stream import verify_stream

    if not folder.config.exists():
        raise Stop(f"run {folder.run_id} ended before it began; there is no ledger", FAILED)
    found = verify_stream(folder)
    result = {
        "run_id": folder.run_id,
        "ok": found.ok,
        "intervals": found.intervals,
        "gaps": found.gaps,
        "overlaps": found.overlaps,
        "records": found.records,
        "dead_letters": found.dead,
    }
    if not found.ok:
        raise Stop("\n".join(found.problems or ()), FAILED, result)
    if not as_json:
        print(
            f"{found.intervals:,} intervals abut: no gap, no overlap; {found.records:,} records, {found.dead:,} of "
            f"them broken and {found.late:,} late; every line is the one that was written"
        )
    return result
