"""Sources that lie elsewhere: pyarrow's S3 client against the few requests of S3 that reading needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from nestling.config import DataConfig
from nestling.data import DataError, check_source, open_source, prepare

OBJECTS = {f"texts/{number:02}.txt": f"Text number {number}.".encode() for number in range(30)}
OBJECTS |= {"texts/rows.jsonl": b'{"text": "a row"}\n{"text": "another row"}\n', "other/broken.jsonl": b"{"}
OBJECTS |= {"texts/.hidden": b"x"}


class S3(BaseHTTPRequestHandler):
    """HEAD and GET of objects, and lists of them, in one bucket called `bucket`."""

    protocol_version = "HTTP/1.1"
    requests: list[str] = []
    time = 1_700_000_000

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).removeprefix("/bucket").strip("/")
        S3.requests.append(f"{self.command} {key}")
        if "list-type" in parse_qs(url.query):
            self.send(200, self.listing(parse_qs(url.query).get("prefix", [""])[0]))
        elif not key:
            self.send(200, b"")
        elif key not in OBJECTS:
            self.send(404, b"")
        elif span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            body = OBJECTS[key][int(first) : int(last) + 1]
            self.send(206, body, {"Content-Range": f"bytes {first}-{last}/{len(OBJECTS[key])}"})
        else:
            self.send(200, OBJECTS[key])

    def listing(self, prefix: str) -> bytes:
        keys = sorted(key for key in OBJECTS if key.startswith(prefix))
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2023-11-14T22:13:{S3.time % 60:02}.000Z</LastModified>"
            f"<Size>{len(OBJECTS[key])}</Size></Contents>"
            for key in keys
        )
        return (
            f"<ListBucketResult><Name>bucket</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>"
            f"{items}</ListBucketResult>"
        ).encode()

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Last-Modified": formatdate(S3.time, usegmt=True), **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """A URI with `{}` for the path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), S3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"s3://key:secret@bucket/{{}}?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
    server.shutdown()
    server.server_close()


def test_a_remote_folder_becomes_a_corpus_once(ray_local: None, place: str, tmp_path: Path) -> None:
    data = DataConfig(source=place.format("texts"), heldout_percent=20)
    corpus = prepare(data, tmp_path)
    assert corpus.parts[0].counts.documents == 32
    S3.requests.clear()
    assert prepare(data, tmp_path).folder == corpus.folder
    assert not [request for request in S3.requests if request.startswith("GET texts/")]  # only listed
    S3.time += 1
    assert prepare(data, tmp_path).folder != corpus.folder


def test_a_remote_glob(place: str) -> None:
    assert [shard.path for shard in open_source(place.format("texts/0[1-3].*")).shards] == [
        f"bucket/texts/0{number}.txt" for number in (1, 2, 3)
    ]


def test_a_check_lists_nothing_and_reads_nothing(place: str) -> None:
    S3.requests.clear()
    check_source(place.format("texts/00.txt"))
    assert S3.requests == ["HEAD texts/00.txt"]
    with pytest.raises(DataError, match=r"data\.source: bucket/none does not exist; give a text, JSONL"):
        check_source(place.format("none"))


def test_what_is_wrong_elsewhere_is_named(ray_local: None, place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source: bucket/other/broken\.jsonl: line 1 is not JSON"):
        prepare(DataConfig(source=place.format("other")), tmp_path)
