"""What a source string means for a stream."""

from __future__ import annotations

from nestling.config import JobConfig
from nestling.config.stream import StreamConfig
from nestling.data.embedded import DOMAINS
from nestling.data.errors import DataError
from nestling.data.sources import absolute
from nestling.data.streams.fields import Fields
from nestling.data.streams.five_domains import NAME, SHUFFLED, FiveDomains
from nestling.data.streams.folder import Folder
from nestling.data.streams.generator import Generator
from nestling.data.streams.kafka import Kafka
from nestling.data.streams.several import Part, Several
from nestling.data.streams.source import StreamSource


def open_stream(config: JobConfig) -> StreamSource:
    """The source of a job's stream, or its several ones.

    Raises:
        DataError: it is no source of a stream, or what it needs is not there.
    """
    data, stream = config.data, config.stream
    if data.mix is not None:
        raise DataError(
            "data.mix: a stream reads its sources in their order and knows no weights; leave data.mix out, and name "
            "several sources in stream.sources"
        )
    if stream.sources is None:
        return _open(data.source, data.column, stream, "data.source")
    opened = []
    for place, part in enumerate(stream.sources):
        source = _open(part.source, part.column or data.column, stream, f"stream.sources.{place}.source")
        opened.append(Part(str(part.name), source))
    return Several(tuple(opened))


def _open(spec: str, column: str, stream: StreamConfig, key: str) -> StreamSource:
    """The source that a source string means, which messages call `key`."""
    fields = Fields(column, stream.key_column, stream.time_column, stream.domain_column, stream.record_bytes)
    if spec.startswith("kafka://"):
        kafka = Kafka(spec, fields)
        kafka.check()
        return kafka
    if stream.lateness is not None and stream.time_column is None:
        raise DataError(
            f"stream.lateness: got {stream.lateness}, but records have no event time; name the field that holds it "
            "with stream.time_column"
        )
    if spec in (NAME, SHUFFLED):
        return FiveDomains(spec)
    if spec.startswith("embedded:"):
        raise DataError(
            f"{key}: got {spec}, which ends and has no order in time; a stream takes {NAME}, {SHUFFLED}, a "
            f"folder, kafka://HOST:PORT/TOPIC or python:MODULE:FUNCTION (nestling train takes embedded:"
            f"{', '.join(DOMAINS)})"
        )
    if spec.startswith("python:"):
        generator = Generator(spec, fields)
        generator.ended({})
        return generator
    folder = Folder(absolute(spec), fields, stream.settle_after)
    folder.ends({})
    return folder
