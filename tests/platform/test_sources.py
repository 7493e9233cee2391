"""Files, folders, globs and URIs: how they are found and cut, and what is said about those that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nestling.data import DataError, absolute, check_source, open_source, sources
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


def names(spec: Path | str, root: Path) -> list[str]:
    return [str(Path(shard.path).relative_to(root)) for shard in open_source(str(spec)).shards]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.txt", ["a.txt", "b[1].txt"]),
        ("b[[]1].txt", ["b[1].txt"]),
        ("b[1].txt", ["b[1].txt"]),  # it exists
        ("[!b]*.txt", ["a.txt"]),
        ("?.txt", ["a.txt"]),
        ("**/*.txt", ["2023/x.txt", "2024/deep/z.txt", "2024/y.txt", "a.txt", "b[1].txt"]),
        ("202?", ["2023/x.txt", "2024/deep/z.txt", "2024/y.txt"]),  # folders that match
        ("202[4-9]/*.txt", ["2024/y.txt"]),
    ],
)
def test_globs(tmp_path: Path, glob: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b[1].txt", "2023/x.txt", "2024/y.txt", "2024/deep/z.txt", "2024/.hidden.txt", "c.md"):
        write(tmp_path / name, name)
    assert names(tmp_path / glob, tmp_path) == found
    monkeypatch.chdir(tmp_path)
    assert names(glob, tmp_path) == found
    if "?" not in glob and glob != "b[1].txt":  # in a URI these are a query and a glob
        assert names(f"file://{tmp_path}/{glob}", tmp_path) == found


def test_a_glob_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text in .* \(what matches .*\*\.txt\): it holds no files"):
        open_source(f"{tmp_path}/*.txt")
    with pytest.raises(DataError, match=r"/none does not exist"):
        open_source(f"{tmp_path}/none/*.txt")


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    os.symlink(tmp_path, tmp_path / "round")
    os.symlink("nowhere", tmp_path / "broken")
    assert names(tmp_path, tmp_path) == ["a.txt"]


def test_a_uri_is_checked_without_listing(tmp_path: Path) -> None:
    check_source(f"file://{tmp_path}")  # an empty folder: only preparing finds that out
    with pytest.raises(DataError, match="SOURCE: /none/such does not exist"):
        check_source("file:///none/such", key="SOURCE")
    for spec in ("file:///a/b", "s3://bucket/x", "embedded:english", "/a/*.txt"):
        assert absolute(spec) == spec
    assert absolute("x/*.txt") == str(Path.cwd() / "x/*.txt")


def test_undecodable_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    good = "Zeile é\ufffd\n" * 200_000  # a real U+FFFD is none of ours; several windows, many documents
    place = len(good.encode())
    path = write(tmp_path / "latin.txt", b"\xef\xbb\xbf" + good.encode() + b"na\xefve \xe2\x82")
    found = documents(path)
    assert "".join(document.text for document in found) == good + "na\ufffdve \ufffd\ufffd"
    assert sum(document.replaced for document in found) == 3
    assert [document.place for document in found if document.place] == [f"{path}: byte {3 + place + 2}"]


def packed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        return write(path, gzip.compress(content))
    if path.suffix == ".bz2":
        return write(path, bz2.compress(content))
    with pa.output_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as stream:
        stream.write(content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
def test_packed_files(tmp_path: Path, suffix: str) -> None:
    rows = b"".join(json.dumps({"id": n, "text": f"row {n}"}).encode() + b"\n" for n in range(3))
    assert texts(packed(tmp_path / f"a.jsonl{suffix}", rows)) == ["row 0", "row 1", "row 2"]
    assert texts(packed(tmp_path / f"a.txt{suffix}", "Text é".encode())) == ["Text é"]


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"body": "a\n\nb" * 9000, "n": 1}).encode(),  # never cut
        b"",
        b'{"body": null}',
        b'{"body": "na\xefve", "other": "\xff"}',
        b'{"body": "half \\ud83d", "n": [1]}',
        b'{"body": "nul \\u0000"}',
    ]
    found = documents(write(tmp_path / "rows.ndjson", b"\r\n".join(lines)), "body")
    assert [document.text for document in found] == ["a\n\nb" * 9000, "", "na\ufffdve", "half \ufffd", "nul \0"]
    assert [document.replaced for document in found] == [0, 0, 1, 1, 0]
    offset = len(lines[0]) + 2 + 2 + len(lines[2]) + 2
    assert found[2].place == f"{tmp_path}/rows.ndjson: byte {offset + 12} (line 4)"
    first = write(tmp_path / "first.jsonl", b"\xef\xbb\xbf" + lines[3])
    assert documents(first, "body")[0].place == f"{first}: byte 15 (line 1)"
    assert found[3].place == f"{tmp_path}/rows.ndjson: byte {offset + len(lines[3]) + 2} (line 5)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl: line 2 is not JSON: Unterminated string"),
        ("[1]", r"line 2 is a list, needs an object such as \{'text': \.\.\.\}"),
        ('{"body": "x", "id": 1}', r"line 2 has no column 'text', it has 'body', 'id'; set `column` to the one"),
        ('{"text": 3}', r"line 2: column 'text' holds a number, needs text; choose another"),
    ],
)
def test_broken_jsonl(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n"))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a é", None, "", "b"], pa.string()).cast(kind)
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "body": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", "body") == ["a é", "", "", "b"]


def test_a_large_parquet_file_is_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {number}" for number in range(1000)]
    raw = [row.encode() for row in rows]
    raw[777] += b" \xff"
    table = pa.table({"text": pa.array(raw, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    monkeypatch.setattr(sources, "SLICE", (tmp_path / "a.parquet").stat().st_size // 4 + 1)
    assert len(open_source(str(tmp_path)).shards) == 4
    rows[777] += " \ufffd"
    assert texts(tmp_path) == rows
    assert [document.place for document in documents(tmp_path) if document.replaced] == [
        f"{tmp_path}/a.parquet: row 777: byte 8"
    ]


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text', it has 'n', 'body'; set `column`"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'n' holds int64, needs text"):
        texts(tmp_path / "a.parquet", "n")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read: .*magic bytes"):
        texts(write(tmp_path / "b.parquet", "no parquet"))


def test_files_that_cannot_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read: zlib inflate failed"):
        texts(write(tmp_path / "a.txt.gz", "not packed at all"))
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: cannot be read: Truncated"):
        texts(write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9]))


def test_a_folder_of_everything(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "b.jsonl", '{"text": "json"}\n')
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "c.parquet")
    write(tmp_path / "d.txt", "")
    assert texts(tmp_path) == ["text", "json", "parquet", ""]


def test_the_column_and_the_kind_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    line = '{"text": "a", "body": "b"}'
    rows, plain = write(tmp_path / "a.jsonl", line), write(tmp_path / "a.txt", line)
    assert open_source(str(rows)).fingerprint() != open_source(str(rows), "body").fingerprint()
    assert open_source(str(rows)).fingerprint() != open_source(str(plain)).fingerprint()
    assert open_source(str(plain)).fingerprint() == open_source(str(plain), "body").fingerprint()
