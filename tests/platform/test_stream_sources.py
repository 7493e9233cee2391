"""Sources of streams: the same interval is the same records, and whatever is wrong is one broken record."""

import hashlib
import json
import os
import time
from datetime import UTC, datetime
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nestling.data import DataError
from nestling.data.streams.fields import Fields
from nestling.data.streams.five_domains import ORDER, FiveDomains
from nestling.data.streams.folder import Folder
from nestling.data.streams.generator import Generator
from nestling.data.streams.kafka import Kafka
from nestling.data.streams.source import Broken, Interval, Record


def everything(source):
    return [record for name, end in source.ends({}).items() for record in source.read(Interval(name, 0, end))]


def old(path):
    """Make a file look as if it had not changed for long."""
    os.utime(path, (time.time() - 100, time.time() - 100))


def test_lines_are_found_again_by_their_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("first\nsécond\n\nlast without an end")
    source = Folder(str(tmp_path), Fields())
    (path, end), *_ = source.ends({}).items()
    assert end == len("first\nsécond\n\n".encode())  # the half line waits
    records = list(source.read(Interval(path, 0, end)))
    assert [record.text for record in records] == ["first\n", "sécond\n", "\n"]
    assert [(record.offset, record.end) for record in records] == [(0, 6), (6, 14), (14, 15)]
    assert list(source.read(Interval(path, 6, 14))) == records[1:2]
    old(tmp_path / "a.txt")
    (settled,) = source.ends({}).values()
    assert list(source.read(Interval(path, 15, settled)))[0].text == "last without an end"


def test_appended_lines_and_new_files_are_seen_and_lost_ones_are_an_error(tmp_path):
    file = tmp_path / "b.txt"
    file.write_text("one\n")
    source = Folder(str(tmp_path), Fields())
    assert list(source.ends({}).values()) == [4]
    with file.open("a") as more:
        more.write("two\nhal")
    (tmp_path / "a.txt").write_text("new\n")
    assert source.ends({str(file): 4}) == {str(tmp_path / "a.txt"): 4, str(file): 8}
    file.write_text("x\n")
    with pytest.raises(DataError, match=r"b.txt has 2 bytes, but 8 of it were read already; files of a"):
        source.ends({str(file): 8})


def test_broken_records_go_one_by_one(tmp_path):
    lines = [
        json.dumps({"text": "good", "at": 1.5, "who": "a"}).encode(),
        b'{"text": "bad utf-8 \xff", "at": 1, "who": "a"}',
        b"{not json",
        b"[1, 2]",
        b"",
        json.dumps({"text": "  ", "at": 1, "who": "a"}).encode(),
        json.dumps({"other": "x"}).encode(),
        json.dumps({"text": "y" * 200, "at": 1, "who": "a"}).encode(),
        json.dumps({"text": "no time", "who": "a"}).encode(),
        json.dumps({"text": "no domain", "at": 1}).encode(),
        json.dumps({"text": "iso", "at": "2026-01-01T00:00:00", "who": "b"}).encode(),
        json.dumps({"text": "half \ud800", "at": 1, "who": "a"}).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    records = everything(Folder(str(tmp_path), Fields(time="at", domain="who", limit=150)))
    reasons = [record.reason.split(":")[0] if isinstance(record, Broken) else record.text for record in records]
    assert reasons == [
        *("good", "no UTF-8 (byte 20)", "no JSON", "no JSON object but list", "empty", "empty"),
        *("no text in the field 'text'", "oversized", "no event time in the field 'at'", "missing field 'who'"),
        *("iso", "no UTF-8"),
    ]
    assert records[10].event_time == datetime(2026, 1, 1, tzinfo=UTC).timestamp() and records[0].event_time == 1.5
    assert all(before.end == after.offset for before, after in pairwise(records))
    broken = [record for record in records if isinstance(record, Broken)]
    assert all(len(record.sha256) == 64 for record in broken)


def test_parquet_counts_rows_over_its_groups(tmp_path):
    table = pa.table({"text": [f"row {n}" for n in range(10)] + [None], "kind": ["k"] * 11})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = Folder(str(tmp_path), Fields(domain="kind"))
    (path,) = source.ends({})
    found = list(source.read(Interval(path, 3, 9)))
    assert [record.text for record in found] == [f"row {n}" for n in range(3, 9)] and found[0].domain == "k"
    assert isinstance(everything(source)[10], Broken)


def test_a_line_without_end_takes_neither_memory_nor_time(tmp_path):
    long = b"x" * 5_000_000
    (tmp_path / "a.txt").write_bytes(b"short\n" + long + b"\nafter\n")
    source = Folder(str(tmp_path), Fields(limit=1000))
    began = time.process_time()
    first, broken, last = everything(source)
    assert time.process_time() - began < 2
    assert (first.text, last.text) == ("short\n", "after\n")
    assert broken.reason == "oversized: 5000001 bytes, stream.record_bytes is 1000"
    assert broken.sha256 == hashlib.sha256(long + b"\n").hexdigest()
    assert (broken.offset, broken.end) == (6, 6 + len(long) + 1)


def test_packed_files_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="packed files cannot grow and cannot be read by offset; unpack it"):
        Folder(str(tmp_path), Fields()).ends({})


def numbers(offset):
    if offset >= 5:
        raise StopIteration
    return {"text": f"record {offset}", "domain": "even" if offset % 2 == 0 else "odd"}


def test_a_function_is_a_source_until_it_stops():
    name = f"python:{__name__}:numbers"
    source = Generator(name, Fields(domain="domain"))
    assert not source.ended({}) and source.ended({name: 5})
    end = source.ends({})[name]
    assert source.cut(Interval(name, 1, end), 10_000) == (5, 32)
    assert [record.text for record in source.read(Interval(name, 1, 5))] == [f"record {n}" for n in range(1, 5)]
    with pytest.raises(DataError, match="gives nothing at offset 5, where there was a record before"):
        list(source.read(Interval(name, 1, 6)))
    with pytest.raises(DataError, match=r"needs python:MODULE:FUNCTION with a module that the workers can import"):
        Generator("python:no.such:thing", Fields()).ended({})


def test_the_five_domains_come_one_after_another():
    source = FiveDomains()
    records = everything(source)
    domains = [record.domain for record in records]
    assert list(dict.fromkeys(domains)) == list(ORDER) and domains == sorted(domains, key=ORDER.index)
    for domain in ORDER:
        size = sum(len(record.text.encode()) for record in records if record.domain == domain)
        assert 320_000 < size <= 330_000, domain
    shuffled = everything(FiveDomains("embedded:five-domains-shuffled"))
    assert sorted(record.key for record in shuffled) == sorted(record.key for record in records)
    assert len({record.domain for record in shuffled[:40]}) >= 4
    assert source.ended({"0": len(records)}) and not source.ended({"0": len(records) - 1})


@pytest.fixture(scope="module")
def broker():
    """A broker that speaks Kafka's protocol on a port of this machine, in librdkafka itself."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    brokers = producer.list_topics(timeout=10).brokers
    (place,) = (f"{one.host}:{one.port}" for one in brokers.values())
    yield producer, place


def test_a_topic_is_read_by_its_offsets(broker):
    producer, place = broker
    for n in range(30):
        content = b"\xff" if n == 7 else json.dumps({"text": f"message {n}"}).encode()
        producer.produce("news", content, key=f"k{n}", partition=n % 2, timestamp=1000 * (n + 1))
    producer.flush(10)
    source = Kafka(f"kafka://{place}/news", Fields())
    ends = {name: end for name, end in source.ends({}).items() if end}
    assert ends == {"0": 15, "1": 15}
    found = list(source.read(Interval("1", 2, 6)))
    assert [(record.offset, record.end) for record in found] == [(2, 3), (3, 4), (4, 5), (5, 6)]
    assert isinstance(found[1], Broken) and isinstance(found[0], Record)
    assert (found[0].text, found[0].key, found[0].event_time) == ("message 5", "k5", 6.0)
    assert source.cut(Interval("0", 0, 15), 25) == (3, 27)  # "message 0", "message 2", "message 4"
    with pytest.raises(DataError, match="partition 0 holds the offsets 0 to 15, but the stream stands at 99"):
        source.ends({"0": 99})


def test_what_is_no_topic_says_so(broker):
    with pytest.raises(DataError, match="needs kafka://HOST:PORT/TOPIC"):
        Kafka("kafka://nowhere", Fields()).check()
    with pytest.raises(DataError, match="got value=xml, needs value=json or value=text"):
        Kafka("kafka://h:1/t?value=xml", Fields()).check()
    assert Kafka("kafka://h:1/t?sasl.password=secret", Fields()).name == "kafka://h:1/t"
