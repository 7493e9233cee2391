"""`nestling levels`: a model and its training as nested problems, each at a frequency of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nestling.config import JobConfig, load
from nestling.config.load import is_job
from nestling.jobs.arguments import AsJson, Overrides, for_reading, found_run, job_for_reading, need_writable
from nestling.jobs.output import WRONG_USAGE, Stop, print_table, say, verb

if TYPE_CHECKING:
    from nestling.training.nested import Row

JobOrRun = Annotated[str, typer.Argument(metavar="JOB|RUN", help="A job file or its name, or a run as in other verbs.")]


@verb("components", "figure")
def levels(
    subject: JobOrRun,
    overrides: Overrides = None,
    figure: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .svg); by default in the run, or beside the runs.")
    ] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Show every component of a model and its training: what it compresses, how, and how often."""
    config, picture = _subject(subject, overrides or [])
    picture = _writable(picture, figure)
    from nestling.tracking.levels_figure import levels_figure
    from nestling.training.nested import nested_view

    rows = nested_view(config)
    picture.parent.mkdir(parents=True, exist_ok=True)
    levels_figure([(row.component, row.level) for row in rows], picture, f"{config.run.name}: {config.model.name}")
    if not as_json:
        ways = {way: f"[{number}]" for number, way in enumerate(dict.fromkeys(map(_way, rows)), 1)}
        print_table(_table(rows, ways))
        print()
        print_table(_legend(ways))
        print("Updates are per token of its sequence for what lives in one, of the batch for what is trained.")
        print("CMS and group: levels of the job, by its names for them; rest: what is in none of these.")
        if config.continuum.drive == "stream":
            print("In context: moves while the trained model reads, in evaluation and generation; not in training.")
        say(f"figure: {picture}")
    return {"components": [_record(row) for row in rows], "figure": picture}


def _subject(subject: str, overrides: list[str]) -> tuple[JobConfig, Path]:
    """The job with its vocabulary, and where its picture goes."""
    if is_job(subject):
        config = load(subject, overrides)
        return _with_vocabulary(config), Path(config.run.dir).expanduser() / f"levels-{config.run.name}.png"
    places = [override for override in overrides if override.startswith("run.dir=")]
    try:
        folder = found_run(subject, places)
    except Stop as unknown:
        raise Stop(f"{subject}: neither a job file nor a run; {unknown}", WRONG_USAGE) from unknown
    _, changes = for_reading(overrides)  # with other keys it would be another model than the run's
    return job_for_reading(folder, changes), folder.path / "levels.png"


def _writable(picture: Path, figure: Path | None) -> Path:
    """The picture to write: `figure` if a person gave one."""
    if figure is None:
        need_writable(picture.parent, "run.dir", "choose another place with --figure FILE")
        return picture
    if figure.suffix.lower() not in (".png", ".svg") or figure.is_dir():
        raise Stop(f"--figure: got {figure}, needs a file that ends in .png or .svg", WRONG_USAGE)
    need_writable(figure.parent, "--figure", "choose another place")
    return figure


def _with_vocabulary(config: JobConfig) -> JobConfig:
    if config.model.vocab_size is None:
        from nestling.data.errors import DataError
        from nestling.data.preparing import open_tokenizer

        try:
            config.model.vocab_size = open_tokenizer(config.data).vocab_size
        except DataError as error:
            raise Stop(str(error), WRONG_USAGE) from error
    return config


def _record(row: Row) -> dict[str, Any]:
    part = row.component
    return {
        "name": part.name,
        "level": row.level,
        "context": part.context,
        "objective": part.objective,
        "rule": part.rule,
        "updates_per_token": part.updates_per_token,
        "updates_per_step": row.updates_per_step,
        "per": row.per,
        "parameters": part.parameters,
        "state_bytes": part.state_bytes,
        "flops_per_token": part.flops_per_token,
    }


def _way(row: Row) -> tuple[str, str, str]:
    """What a component compresses, by which objective and rule: many components share them."""
    return row.component.context, row.component.objective, row.component.rule


def _table(rows: list[Row], ways: dict[tuple[str, str, str], str]) -> Table:
    """Numbers in a table that a terminal of 100 columns holds; in a narrower one the components' names are folded."""
    table = Table(box=None, pad_edge=False)
    for heading in ("nested\nlevel", "component", "compresses"):
        table.add_column(heading, no_wrap=heading != "component")
    for heading in ("updates\n/token", "updates\n/step", "parameters\nor state", "FLOPs\n/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        part = row.component
        kept = [f"{part.parameters:,}"] * bool(part.parameters) + [_bytes(part.state_bytes)] * bool(part.state_bytes)
        table.add_row(
            str(row.level) if row.level != before else "",
            part.name,
            f"{part.context} {ways[_way(row)]}",
            f"{part.updates_per_token:.3g}",
            f"{row.updates_per_step:.4g}",
            " + ".join(kept),
            f"{part.flops_per_token:,.0f}" if part.flops_per_token else "",
        )
        before = row.level
    return table


def _legend(ways: dict[tuple[str, str, str], str]) -> Table:
    table = Table.grid(padding=(0, 1))
    for (context, objective, rule), mark in ways.items():
        table.add_row(mark, f"{context}: {objective}; {rule}", style="dim")
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"
