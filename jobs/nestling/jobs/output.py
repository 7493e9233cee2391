"""What every verb says and how it ends: one JSON line on request, exit codes, and a terminal that stays readable.

Standard output belongs to the result. Everything else goes to standard error, and what Ray and DeepSpeed print goes to
a log file: both are redirected at the level of file descriptors, because libraries and child processes write there.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from nestling.cluster.output import redirected
from nestling.config import ConfigError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

#: Where people are spoken to: standard error, also while that is redirected to a log file.
terminal = Console(stderr=True, highlight=False)

log = logging.getLogger(__name__)


class Stop(Exception):
    """Ends a verb: what to tell the person, the exit code, and what of the result is known."""

    def __init__(self, message: str, code: int, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.result = dict(result or {})


def verb(*keys: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """Makes a command of a function that returns its result; `keys` are in its JSON even when it fails.

    The function takes `as_json` and prints for people only if that is false.
    """

    def decorate(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: Any, as_json: bool, **options: Any) -> None:
            code = 0
            with _stdout_to_stderr() if as_json else nullcontext():
                try:
                    result = function(*args, as_json=as_json, **options)
                except (Exception, KeyboardInterrupt) as error:
                    message, code, known = _explain(error)
                    say(message, style="red")
                    result = dict.fromkeys(keys) | known | {"error": message or None}
            if as_json:
                print(json.dumps(_plain(result), allow_nan=False), flush=True)
            raise typer.Exit(code)

        return command

    return decorate


def say(message: str, style: str | None = None) -> None:
    """Prints a line for the person, whole, however long it is."""
    if message:
        terminal.print(message, style=style, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table to standard output, whole where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.print(table)


def in_columns(lines: Mapping[str, str]) -> str:
    """Lines of a label and what it stands for."""
    return "\n".join(f"{label:<10}{text}" for label, text in lines.items())


def describe(error: BaseException) -> str:
    """What an error says: Nestling's own messages are complete, others need their kind, none its traceback."""
    if type(error).__module__.startswith("nestling."):
        return str(error)
    lines = str(error).strip().splitlines()
    text = lines[-1] if any(line.startswith("Traceback") for line in lines) else "\n".join(lines)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def log_to_terminal(level: int) -> None:
    """Shows what Nestling's own loggers say, from `level` on, to the person."""
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("nestling")
    logger.handlers = [handler]
    logger.setLevel(level)


@contextmanager
def chatter_to(path: Path) -> Iterator[None]:
    """While it is open, everything but `terminal` and Nestling's loggers is written to a log file."""
    with redirected(path) as screen:
        terminal.file = screen
        try:
            yield
        finally:
            terminal.file = None  # type: ignore[assignment]  # rich: back to standard error, whatever that is by then


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def _explain(error: BaseException) -> tuple[str, int, dict[str, Any]]:
    """Message, exit code and known part of the result of a verb that did not end well."""
    log.debug("the verb ended with an exception", exc_info=error)
    if isinstance(error, Stop):
        return str(error), error.code, error.result
    if isinstance(error, ConfigError):
        return str(error), WRONG_USAGE, {}
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED, {}
    return describe(error), FAILED, {}


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    number = float(value)
    return number if math.isfinite(number) else None
