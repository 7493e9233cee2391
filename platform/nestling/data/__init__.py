"""From sources of text to batches of tokens: sources -> corpus -> feed. Tokenizers and texts come with it."""

from nestling.data.corpus import Corpus, Counts, Part, Tokens
from nestling.data.embedded import DOMAINS
from nestling.data.errors import DataError
from nestling.data.feed import IGNORED, Feed
from nestling.data.preparing import prepare
from nestling.data.sources import Source, absolute, check_source, open_source
from nestling.data.tokenizer import TextStream, Tokenizer

__all__ = [
    "DOMAINS",
    "IGNORED",
    "Corpus",
    "Counts",
    "DataError",
    "Feed",
    "Part",
    "Source",
    "TextStream",
    "Tokenizer",
    "Tokens",
    "absolute",
    "check_source",
    "open_source",
    "prepare",
]
