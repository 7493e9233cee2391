"""A Kafka topic, read by offset: no consumer group, because the offsets that count lie in the snapshot.

Values are JSON objects (`kafka://HOST:PORT/TOPIC`) or plain texts (`?value=text`). The record's key and time are the
message's own where no field is named for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from nestling.data.errors import DataError
from nestling.data.streams.fields import Fields
from nestling.data.streams.source import Broken, Interval, Record, StreamSource

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message

#: Seconds in which a broker answers.
PATIENCE = 15.0
_AT_ONCE = 500


@dataclass(frozen=True)
class Kafka(StreamSource):
    """`kafka://HOST:PORT[,HOST:PORT]/TOPIC[?value=text&KEY=VALUE]`; other keys are librdkafka's settings.

    Attributes:
        spec: as the person wrote it; `name` is it without the settings, which may hold secrets.
    """

    spec: str
    fields: Fields

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.partition("?")[0]

    def check(self) -> None:
        """Raises DataError if the specification says nothing, or confluent-kafka is missing; asks no broker."""
        parts = urlsplit(self.spec)
        if not parts.netloc or not self._topic or "@" in parts.netloc:
            raise DataError(f"{self.name}: needs kafka://HOST:PORT/TOPIC")
        value = self._settings().get("value", "json")
        if value not in ("json", "text"):
            raise DataError(f"{self.name}: got value={value}, needs value=json or value=text")
        try:
            import confluent_kafka  # noqa: F401
        except ImportError as error:
            raise DataError(f"{self.name}: needs the package confluent-kafka: pip install 'nestling[kafka]'") from error

    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        from confluent_kafka import TopicPartition

        with _consumer(self._client()) as consumer:
            ends = {}
            for partition in self._partitions(consumer):
                place = TopicPartition(self._topic, partition)
                low, high = self._asked(lambda place=place: consumer.get_watermark_offsets(place, timeout=PATIENCE))
                before = offsets.get(str(partition))
                if before is not None and not low <= before <= high:
                    raise DataError(
                        f"{self.name}: partition {partition} holds the offsets {low} to {high}, but the stream stands "
                        f"at {before}: what it has not read is gone from the topic (retention); begin a new stream"
                    )
                ends[str(partition)] = high
            return ends

    def begins(self, partition: str) -> int:
        from confluent_kafka import TopicPartition

        with _consumer(self._client()) as consumer:
            place = TopicPartition(self._topic, int(partition))
            low, _ = self._asked(lambda: consumer.get_watermark_offsets(place, timeout=PATIENCE))
            return int(low)

    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        from confluent_kafka import KafkaError, TopicPartition

        with _consumer(self._client()) as consumer:
            consumer.assign([TopicPartition(self._topic, int(interval.partition), interval.start)])
            offset, deadline = interval.start, time.monotonic() + PATIENCE
            while offset < interval.end:
                for message in consumer.consume(_AT_ONCE, timeout=1.0):
                    deadline = time.monotonic() + PATIENCE
                    problem, place = message.error(), int(message.offset() or 0)
                    if problem is not None:
                        if problem.code() != KafkaError._PARTITION_EOF:
                            raise DataError(f"{self.name}: {problem.str()}")
                        offset = max(offset, place)  # what is missing up to here was compacted away
                        continue
                    if place >= interval.end:
                        return
                    offset = place + 1
                    yield self._record(message, interval.partition, place)
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{self.name}: partition {interval.partition} gave nothing for {PATIENCE:.0f} seconds at "
                        f"offset {offset}, needs what lies before {interval.end}"
                    )

    def _record(self, message: Message, partition: str, offset: int) -> Record | Broken:
        raw = message.value() or b""
        key = message.key()
        kind, millis = message.timestamp()
        known: dict[str, Any] = {
            "key": key.decode("utf-8", "replace") if isinstance(key, bytes) else key,
            "event_time": millis / 1000 if kind else None,
        }
        if self._settings().get("value") == "text":
            try:
                row = {self.fields.text: raw.decode("utf-8")}
            except UnicodeDecodeError as error:
                return Broken.of(partition, offset, offset + 1, f"no UTF-8 (byte {error.start})", raw)
            return self.fields.of_row(partition, offset, offset + 1, row, raw, **known)
        return self.fields.of_json(partition, offset, offset + 1, raw, **known)

    @property
    def _topic(self) -> str:
        return urlsplit(self.spec).path.strip("/")

    def _settings(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.spec).query))

    def _client(self) -> dict[str, Any]:
        settings = self._settings()
        settings.pop("value", None)
        return {
            "bootstrap.servers": urlsplit(self.spec).netloc,
            "group.id": "nestling",  # librdkafka wants one; nothing is committed to it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "log_level": 0,
            **settings,
        }

    def _partitions(self, consumer: Consumer) -> list[int]:
        topics = self._asked(lambda: consumer.list_topics(self._topic, timeout=PATIENCE)).topics
        topic = topics.get(self._topic)
        if topic is None or topic.error is not None:
            why = "is not there" if topic is None else topic.error.str()
            raise DataError(f"{self.name}: topic {self._topic!r}: {why}")
        return sorted(topic.partitions)

    def _asked(self, question: Any) -> Any:
        from confluent_kafka import KafkaException

        try:
            return question()
        except KafkaException as error:
            raise DataError(f"{self.name}: no answer from the broker: {error.args[0].str()}") from error


class _consumer:
    """A consumer that is closed at the end."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from confluent_kafka import Consumer

        self._consumer = Consumer(settings)

    def __enter__(self) -> Consumer:
        return self._consumer

    def __exit__(self, *_: object) -> None:
        self._consumer.close()
