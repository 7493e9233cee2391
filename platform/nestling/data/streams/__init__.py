"""Streams of records without end: sources, windows, and the batches that they become."""

from nestling.data.streams.content import Batch, Rules
from nestling.data.streams.opened import open_stream
from nestling.data.streams.reader import Opening, Reading
from nestling.data.streams.source import Broken, Interval, Record, StreamSource
from nestling.data.streams.windows import Planner, Position, WindowFolder

__all__ = [
    "Batch",
    "Broken",
    "Interval",
    "Opening",
    "Planner",
    "Position",
    "Reading",
    "Record",
    "Rules",
    "StreamSource",
    "WindowFolder",
    "open_stream",
]
