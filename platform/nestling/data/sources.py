"""A source string becomes a Ray Dataset of documents, in a fixed order.

`embedded:<domain>` reads a corpus of `nestling.data.embedded`; anything else is the path of a text file, or of a folder
whose text files are read recursively (names with a leading dot are skipped). Long files are cut at blank lines into
documents, window by window, so that memory does not grow with the file. What cannot be read becomes a row with an error
and not an exception in a Ray task: whoever reads the rows decides, and the person sees one line, not Ray's traceback.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.data.embedded import DOMAINS
from nestling.data.errors import DataError

if TYPE_CHECKING:
    from ray.data import Dataset

#: A text file is cut at the first blank line after so many characters, ...
SHORTEST_DOCUMENT = 4096
#: ... at the last line's end before so many if there is none, and right there if it has no lines.
LONGEST_DOCUMENT = 16384
_WINDOW = 1 << 20
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_EMBEDDED = "embedded:"


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    #: As the person wrote it.
    spec: str
    #: How parts become documents: `text`, or the name of an embedded domain.
    kind: str
    #: What can be read independently, in order: paths of files, or labels that name content and version.
    parts: list[str]
    #: The (name, text) of each document of a part.
    read: Callable[[str], Iterator[tuple[str, str]]]

    def fingerprint(self) -> str:
        """SHA-256 over the kind and the content of every part, in order; where the files lie does not matter."""
        digest = hashlib.sha256(self.kind.encode())
        for part in self.parts:
            if Path(part).is_file():
                with open(part, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(part.encode())
        return digest.hexdigest()

    def dataset(self) -> Dataset:
        """Documents as rows of `name`, `text` and `error` (empty, or why the part could not be read to its end).

        Documents without any text are left out. Needs a running Ray.
        """
        import ray.data

        # A few blocks a CPU: enough to keep all busy, and starting a task costs more than reading a small file.
        blocks = min(len(self.parts), 4 * max(1, int(ray.cluster_resources().get("CPU", 1))))
        rows = ray.data.from_items([{"part": part} for part in self.parts], override_num_blocks=blocks)
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False
        rows.context.target_max_block_size = 16 << 20
        return rows.flat_map(partial(_documents, read=self.read))


def open_source(spec: str) -> Source:
    """Find what a source string means.

    Raises:
        DataError: unknown domain, missing path, or nothing but empty files.
    """
    if spec.startswith(_EMBEDDED):
        name = spec.removeprefix(_EMBEDDED)
        if name not in DOMAINS:
            near = "".join(f", did you mean {word!r}?" for word in difflib.get_close_matches(name, DOMAINS, n=1))
            raise DataError(f"data.source: there is no embedded domain {name!r}{near}; there are {', '.join(DOMAINS)}")
        return Source(spec, name, DOMAINS[name].parts(), DOMAINS[name].read)
    if not spec.strip():
        raise DataError("data.source: got an empty text, needs a text file, a folder or embedded:<domain>")
    root = Path(spec).expanduser()
    if not root.exists():
        fix = (
            f"did you mean {_EMBEDDED}{spec}?" if spec in DOMAINS else "give a text file, a folder or embedded:<domain>"
        )
        raise DataError(f"data.source: {root.absolute()} does not exist; {fix}")
    files = _text_files(root) if root.is_dir() else [root]
    if not any(file.stat().st_size for file in files):
        what = f"its {len(files)} files are all empty" if files else "it holds no files"
        raise DataError(f"data.source: no text in {root.absolute()}: {what}; give a source with text in it")
    return Source(spec, "text", [str(file.absolute()) for file in files], read_text)


def read_text(path: str) -> Iterator[tuple[str, str]]:
    """Cut a UTF-8 text file into documents of about 4 to 16 KB; raises DataError at the first undecodable byte."""
    text, number = "", 0
    for window in _windows(path):
        text += window
        start = 0
        while len(text) - start > (LONGEST_DOCUMENT if window else 0):
            end = _cut(text, start)
            yield f"{path}#{number}", text[start:end]
            start, number = end, number + 1
        text = text[start:]


def _windows(path: str) -> Iterator[str]:
    """The decoded text window by window; the last one is empty."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        for raw in chain(iter(partial(file.read, _WINDOW), b""), [b""]):
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                # What the decoder holds ends where the file has been read to.
                offset = file.tell() - len(error.object) + error.start
                if b"\0" in error.object:
                    fix = "the file looks binary, take it out of the source"
                else:
                    fix = "convert the file (iconv -f latin1 -t utf-8) or take it out of the source"
                byte = f"byte {offset} (0x{error.object[error.start]:02x})"
                raise DataError(f"{path}: {byte} is not UTF-8; {fix}") from None


def _cut(text: str, start: int) -> int:
    near, far = start + SHORTEST_DOCUMENT, start + LONGEST_DOCUMENT
    if blank := _BLANK_LINE.search(text, near, far):
        return blank.end()
    if len(text) <= far:
        return len(text)
    return text.rfind("\n", near, far) + 1 or far


def _text_files(root: Path) -> list[Path]:
    relative = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [root / path for path in sorted(relative) if not any(name.startswith(".") for name in path.parts)]


def _documents(row: dict[str, str], read: Callable[[str], Iterator[tuple[str, str]]]) -> Iterator[dict[str, str]]:
    try:
        for name, text in read(row["part"]):
            if text and not text.isspace():
                yield {"name": name, "text": text, "error": ""}
    except (DataError, OSError) as error:
        yield {"name": row["part"], "text": "", "error": str(error)}
