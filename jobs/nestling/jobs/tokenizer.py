"""`nestling tokenizer`: train a tokenizer on a source, for `data.tokenizer=FILE`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.config import from_yaml, pick
from nestling.jobs.arguments import AsJson
from nestling.jobs.output import WRONG_USAGE, Stop, in_columns, say, verb

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="As data.source: a path, a folder, a glob, a URI or embedded:NAME.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="data.heldout_percent, as in the jobs to come.", show_default=False),
]


@verb("tokenizer", "vocab_size", "documents", "bytes", "bytes_per_token", "sha256")
def tokenizer(
    source: Source,
    vocab_size: Annotated[int, typer.Option(min=257, help="Tokens, at least the 256 bytes and a separator.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")] = Path("tokenizer.json"),
    column: Annotated[str, typer.Option(help="Column of JSONL and Parquet files that holds the text.")] = "text",
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Train a byte-level BPE tokenizer on the text that a job would train on."""
    pick(overrides or (), "data.heldout_percent")
    percent = from_yaml("{}", overrides or ()).data.heldout_percent
    if out.exists():
        raise Stop(f"--out: {out} exists; give the name of a new file", WRONG_USAGE)
    from nestling.data import DataError, open_source
    from nestling.data.bpe import train_tokenizer

    try:
        opened = open_source(source, column, key="SOURCE")
    except DataError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    say(f"training on {source}, without the {percent:g} % of its documents that a job would hold out")
    trained = train_tokenizer(opened, vocab_size, percent)
    out.parent.mkdir(parents=True, exist_ok=True)
    definition = trained.tokenizer.definition.encode()
    with out.open("xb") as file:
        file.write(definition)
    result = {
        "tokenizer": str(out),
        "vocab_size": trained.tokenizer.vocab_size,
        "documents": trained.documents,
        "bytes": trained.bytes,
        "bytes_per_token": trained.bytes_per_token,
        "sha256": hashlib.sha256(definition).hexdigest(),
    }
    if not as_json:
        lines = {
            "tokenizer": f"{out}; use it with data.tokenizer={out}",
            "tokens": f"{vocab_size:,}, worth {trained.bytes_per_token:.2f} bytes of held-out text each",
            "text": f"{trained.documents:,} documents, {trained.bytes:,} bytes",
        }
        print(in_columns(lines))
    return result
