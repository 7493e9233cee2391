"""The `data` section of a job: what the model reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nestling.config.checks import need, need_different, need_name, positive, whole


@dataclass
class SourceConfig:
    """One of several sources."""

    #: As `data.source`.
    source: str
    #: Column of JSONL and Parquet files that holds the text; None: data.column.
    column: str | None = None
    #: Name in metrics and messages; None: made from the source.
    name: str | None = None

    def check(self, where: str) -> None:
        """Raises ValueError if the source at `where` (such as "data.mix.0") cannot be used; fills in its name."""
        if self.name is None:
            self.name = _name_of(self.source)
        need_name(f"{where}.name", self.name)


@dataclass
class MixConfig(SourceConfig):
    """One source of a mix."""

    #: Its share of the training sequences and of the evaluation, relative to the other weights.
    weight: float = 1.0

    def check(self, where: str) -> None:
        need(where, self, "a finite value above 0", positive, "weight")
        super().check(where)


def check_sources(where: str, parts: Sequence[SourceConfig], example: str) -> None:
    """Raises ValueError if the list of sources at `where` (such as "data.mix") cannot be used; fills in names."""
    if not parts:
        raise ValueError(
            f"{where}: got an empty list, needs at least one source, for example {example}; "
            "or leave it out and set data.source"
        )
    for place, part in enumerate(parts):
        part.check(f"{where}.{place}")
    need_different(where, "source", [part.name for part in parts])


def _name_of(source: str) -> str:
    """The last word of a source: `english` of embedded:english, `wiki` of /texts/wiki.jsonl.gz and of wiki/*.txt."""
    words = re.split(r"[:/]+", re.sub(r"\?.*=.*", "", source))
    plain = [word for word in words if word and not re.search(r"[*?\[]", word)]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", plain[-1].split(".")[0] if plain else "").strip("-_")
    return name or "text"


@dataclass
class DataConfig:
    """What the model reads."""

    #: `embedded:<domain>` (text that comes with Python), or text, JSONL and Parquet files by path, folder, glob or URI.
    source: str = "embedded:english"
    #: Column of JSONL and Parquet files that holds the text.
    column: str = "text"
    #: Several sources by weight, in the place of `source`.
    mix: list[MixConfig] | None = None
    #: Tokens of one training sequence.
    sequence_length: int = 256
    #: `bytes`, or the path of a `tokenizer.json`.
    tokenizer: str = "bytes"
    #: Token that separates documents; None: the tokenizer's end-of-text token.
    separator: str | None = None
    #: Share of the documents held out from training, in per cent.
    heldout_percent: float = 10.0

    def __post_init__(self) -> None:
        need("data", self, "at least 1", whole, "sequence_length")
        need("data", self, "a value above 0 and below 100", lambda value: 0 < value < 100, "heldout_percent")
        if self.mix is not None:
            check_sources("data.mix", self.mix, "[{source: embedded:english}]")
