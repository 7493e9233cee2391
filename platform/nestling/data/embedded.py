"""Text that comes with Python and with the packages Nestling needs: nothing to download, everything real.

A domain is read part by part (a file, or a range of code points), so that Ray can read parts at the same time. Order
and content depend only on the installed versions, and no module is imported or executed to get at its text. `english`,
`python` and `unicode` need Python alone and never look into site-packages; `cxx` and `js` read installed packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nestling.data.errors import DataError

#: Docstrings up to this many characters say little more than a name.
SHORTEST_DOCSTRING = 200
#: Bytes read from installed packages, in all and from one file.
PACKAGE_LIMIT, FILE_LIMIT = 3_000_000, 32_768
#: Code points of the `unicode` domain and how many of them make a document.
CODE_POINTS, CODE_POINTS_A_DOCUMENT = range(0x80, 0x3000), 128
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Domain:
    """One embedded corpus; calling it yields the (name, text) of each document."""

    #: What it is read from, in a fixed order: paths of files, or labels that name content and version.
    parts: Callable[[], list[str]]
    #: The documents of one part.
    read: Callable[[str], Iterator[tuple[str, str]]]

    def __call__(self) -> Iterator[tuple[str, str]]:
        for part in self.parts():
            yield from self.read(part)


def _library_files() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"no standard library to read in {root}; use a Python whose library is not zipped")
    return [str(file) for file in sorted(files)]


def _read_source(part: str) -> Iterator[tuple[str, str]]:
    with tokenize.open(part) as file:  # honours the coding line
        yield part, file.read()


def _read_english(part: str) -> Iterator[tuple[str, str]]:
    """The long docstrings of a module as one document; each topic of the language reference as one."""
    tree = ast.parse(Path(part).read_bytes())
    if Path(part).parts[-2:] == ("pydoc_data", "topics.py"):
        topics = next(node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value)
        yield from _topics(part, ast.literal_eval(topics))
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    texts = [text for text in found if text and len(text) > SHORTEST_DOCSTRING]
    if texts:
        # A docstring may spell half of a surrogate pair, which UTF-8 cannot hold.
        yield part, "\n\n".join(texts).encode("utf-8", errors="replace").decode() + "\n"


def _topics(part: str, topics: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Topics without the paragraphs of larger ones: chapters repeat their sections, and held-out text must be new."""
    seen: set[str] = set()
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = text.split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen |= {paragraph for paragraph in paragraphs if len(paragraph) > 80}
        if sum(map(len, fresh)) > SHORTEST_DOCSTRING:
            yield f"{part}#{topic}", "\n\n".join(fresh)


def _unicode_parts() -> list[str]:
    starts = range(CODE_POINTS.start, CODE_POINTS.stop, CODE_POINTS_A_DOCUMENT)
    return [f"unicode {unicodedata.unidata_version} from {start:04x}" for start in starts]


def _read_unicode(part: str) -> Iterator[tuple[str, str]]:
    start = int(part.rsplit(maxsplit=1)[-1], 16)
    points = map(chr, range(start, start + CODE_POINTS_A_DOCUMENT))
    yield part, "".join(f"{point} {unicodedata.name(point)}\n" for point in points if unicodedata.name(point, ""))


def _package_files(domain: str, places: dict[str, str]) -> list[str]:
    """Files matching the pattern of each package, a fixed pseudo-random choice up to the limit.

    Neighbours in a folder resemble each other, so the choice goes by a hash of the path.
    """
    files: dict[str, Path] = {}
    for package, pattern in places.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(
                f"embedded:{domain} is read from the package `{package}`, which is missing: pip install {package}"
            )
        root = Path(spec.submodule_search_locations[0])
        files |= {f"{package}/{path.relative_to(root).as_posix()}": path for path in root.glob(pattern)}
    if not files:
        raise DataError(f"embedded:{domain}: no file like {places} in the installed packages; reinstall them")
    chosen, size = [], 0
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size += min(files[name].stat().st_size, FILE_LIMIT)
        if size > PACKAGE_LIMIT:
            break
        chosen.append(name)
    return [str(files[name]) for name in sorted(chosen)]


def _cxx_files() -> list[str]:
    return _package_files("cxx", {"torch": "include/**/*.h"})


def _js_files() -> list[str]:
    places = {"mlflow": "server/js/build/**/*.js", "ray": "dashboard/client/build/**/*.js"}
    return _package_files("js", places)


def _read_start(part: str) -> Iterator[tuple[str, str]]:
    with open(part, "rb") as file:
        yield part, file.read(FILE_LIMIT).decode("utf-8", errors="ignore")


#: The embedded corpora by name; `embedded:<name>` is the source.
DOMAINS: dict[str, Domain] = {
    "english": Domain(_library_files, _read_english),
    "python": Domain(_library_files, _read_source),
    "unicode": Domain(_unicode_parts, _read_unicode),
    "cxx": Domain(_cxx_files, _read_start),
    "js": Domain(_js_files, _read_start),
}
