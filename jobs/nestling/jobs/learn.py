"""`nestling learn`: a run's model learns documents now, in context only (`--fast`) or by steps of its optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestling.config import from_yaml
from nestling.jobs.arguments import AsJson, Run, place_of, trained_run
from nestling.jobs.output import WRONG_USAGE, Stop, chatter_to, in_columns, say, verb
from nestling.tracking.runs import RunBusyError, RunFolder

if TYPE_CHECKING:
    from nestling.evaluation.documents import Document
    from nestling.training.learn import Learnt


@verb("run_id", "documents", "probes", "step", "steps", "saved")
def learn(
    run: Run,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [run.dir=DIR]",
            help="Text, JSONL or Parquet files (their data.column), and where runs are kept.",
            show_default=False,
        ),
    ],
    fast: Annotated[
        bool, typer.Option("--fast", help="Only read them: no weight changes, nestling forget --fast undoes it.")
    ] = False,
    passes: Annotated[int, typer.Option(min=1, help="Times through all documents, without --fast.")] = 4,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Teach a model documents, and see what it makes of them and of what it knew, before and after."""
    places = [given for given in files if given.startswith("run.dir=")]
    paths = list(dict.fromkeys(given for given in files if given not in places))
    if not paths:
        raise Stop("FILE: got none, needs one document or more", WRONG_USAGE)
    folder = trained_run(run, places)
    documents = _read(folder, paths)
    say(f"run {folder.run_id} ({folder.name}) learns; DeepSpeed's output: {folder.ray_log}")
    try:
        with chatter_to(folder.ray_log):
            from nestling.training.learn import learn_documents, read_in_context

            learnt = read_in_context(folder, documents) if fast else learn_documents(folder, documents, passes)
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    if not as_json:
        print(_report(folder, documents, learnt, fast))
    return {
        "run_id": folder.run_id,
        "documents": [document.about() | _change(*learnt.documents[document.name]) for document in documents],
        "probes": {domain: _change(*losses) for domain, losses in learnt.probes.items()},
        "step": learnt.step,
        "steps": learnt.steps,
        "saved": learnt.saved,
    }


def _read(folder: RunFolder, paths: list[str]) -> list[Document]:
    from nestling.data.errors import DataError
    from nestling.evaluation.documents import read_document

    column = from_yaml(folder.config.read_text(encoding="utf-8")).data.column
    try:
        return [read_document(path, column) for path in paths]
    except DataError as error:
        raise Stop(str(error), WRONG_USAGE) from error


def _change(before: float, after: float) -> dict[str, float]:
    return {"before": before, "after": after}


def _report(folder: RunFolder, documents: list[Document], learnt: Learnt, fast: bool) -> str:
    lines = {document.name: (*learnt.documents[document.name], f", {document.bytes:,} bytes") for document in documents}
    lines |= {f"probe {domain}": (*losses, "") for domain, losses in learnt.probes.items()}
    width = max(map(len, lines))
    said = [
        f"{name:<{width}}  {before:.3f} -> {after:.3f} bits per byte ({after - before:+.3f}){more}"
        for name, (before, after, more) in lines.items()
    ]
    run, place = folder.run_id, place_of(folder)
    ended = {"saved": learnt.saved}
    if fast:
        ended["undo"] = f"nestling forget {run} --fast{place}"
    else:
        ended["steps"] = f"{learnt.steps:,}, to step {learnt.step:,}"
    return "\n".join([*said, in_columns(ended)])
