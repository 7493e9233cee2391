"""Text files and folders: how they are cut, what is skipped, and what is said about those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestling.data import DataError, open_source
from nestling.data.readers import _WINDOW, LONGEST_DOCUMENT, SHORTEST_DOCUMENT, Document


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents(spec: Path | str, column: str = "text") -> list[Document]:
    source = open_source(str(spec), column)
    return [document for shard in source.shards for document in source.read(shard)]


def texts(spec: Path | str, column: str = "text") -> list[str]:
    return [document.text for document in documents(spec, column)]


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n", " "])
def test_a_file_is_cut_without_losing_a_character(tmp_path: Path, end: str) -> None:
    content = "".join(f"Paragraph {number} über nichts." + end for number in range(60_000))
    found = texts(write(tmp_path / "a.txt", content))
    assert "".join(found) == content and len(content.encode()) > _WINDOW
    assert all(SHORTEST_DOCUMENT <= len(text) <= LONGEST_DOCUMENT for text in found[:-1])
    if end != " ":
        assert all(text.endswith(end) for text in found)
    if "\n" in end and len(end) > 1:
        assert all(len(text) < SHORTEST_DOCUMENT + 100 for text in found)


def test_characters_across_windows_survive(tmp_path: Path) -> None:
    content = "a" + "é" * _WINDOW
    assert "".join(texts(write(tmp_path / "a.txt", content))) == content


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfhi")) == ["hi"]


def test_a_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/deep/er/x", ".hidden", ".git/config", "a/.cache/y"):
        write(tmp_path / name, name)
    shards = open_source(str(tmp_path)).shards
    assert [str(Path(shard.path).relative_to(tmp_path)) for shard in shards] == ["a/deep/er/x", "a/z.md", "b.txt"]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for folder in ("one", "two", "other"):
        write(tmp_path / folder / "a.txt", "same")
        write(tmp_path / folder / "b.txt", folder if folder == "other" else "text")
    one, two, other = (open_source(str(tmp_path / folder)).fingerprint() for folder in ("one", "two", "other"))
    assert one == two != other
    assert open_source("embedded:english").fingerprint() != open_source("embedded:python").fingerprint()


def test_the_dataset_keeps_order(ray_local: None, tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02}.txt", "" if number % 7 == 0 else f"text {number}")
    rows = open_source(str(tmp_path)).dataset().take_all()
    assert [row["text"] for row in rows] == ["" if number % 7 == 0 else f"text {number}" for number in range(30)]
    assert not any(row["error"] for row in rows)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"data\.source: /.*/none does not exist; give a text, JSONL or Parquet file, a folder, a glob, a URI or",
    ):
        open_source(str(tmp_path / "none"))
    with pytest.raises(DataError, match="english does not exist; did you mean embedded:english\\?"):
        open_source("english")


def test_a_source_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text in /.*: it holds no files; give a source with text in it"):
        open_source(str(tmp_path))
    write(tmp_path / "a.txt", "")
    with pytest.raises(DataError, match="no text in /.*: its 1 files are all empty"):
        open_source(str(tmp_path))


def test_a_picture_among_the_texts_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"logo\.txt: holds a NUL byte; the file looks binary, take it out of the source"
    ):
        documents(write(tmp_path / "logo.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"))
