"""The `nestling` command: its verbs, one module each, and what holds for all of them.

Verbs import torch, Ray and MLflow only when they run, so that help, configuration errors and lists of runs come at
once.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nestling.jobs.adapt import adapt
from nestling.jobs.best import best
from nestling.jobs.compare import compare
from nestling.jobs.config import config
from nestling.jobs.doctor import doctor
from nestling.jobs.evaluate import evaluate
from nestling.jobs.export import export
from nestling.jobs.forget import forget
from nestling.jobs.generate import generate
from nestling.jobs.learn import learn
from nestling.jobs.level import level
from nestling.jobs.levels import levels
from nestling.jobs.memory import memory
from nestling.jobs.output import log_to_terminal
from nestling.jobs.reproduce import reproduce
from nestling.jobs.resume import resume
from nestling.jobs.runs import runs
from nestling.jobs.snapshot import snapshot
from nestling.jobs.status import status
from nestling.jobs.stream import stream
from nestling.jobs.sweep import sweep
from nestling.jobs.tokenizer import tokenizer
from nestling.jobs.train import train
from nestling.jobs.ui import ui


class _Verbs(TyperGroup):
    """The verbs; wrong usage, which no verb gets to see, ends with a JSON line too where that was asked for."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        try:
            return super().main(given, *rest, **options)
        except SystemExit as end:
            # Typer has told the person and exits while it handles its own error.
            message = getattr(end.__context__, "format_message", None)
            if message is not None and "--json" in given:
                print(json.dumps({"error": message()}))
            raise


app = typer.Typer(
    name="nestling",
    cls=_Verbs,
    help="Train models that keep learning.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration (nothing was started), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False) -> None:
    log_to_terminal(logging.DEBUG if debug else logging.INFO)


for _verb in (
    train,
    resume,
    stream,
    status,
    learn,
    forget,
    adapt,
    evaluate,
    generate,
    export,
    runs,
    compare,
    levels,
    reproduce,
    sweep,
    best,
    ui,
    config,
    doctor,
    tokenizer,
):
    app.command()(_verb)
app.add_typer(memory)
app.add_typer(snapshot)
app.add_typer(level)


def main() -> None:
    # What kill, Docker and Slurm send ends like Ctrl-C: the run is marked, and nothing is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


if __name__ == "__main__":
    main()
