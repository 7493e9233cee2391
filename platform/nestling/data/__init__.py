"""From a source of text to batches of tokens: sources -> corpus -> feed. Tokenizers and texts come with it."""

from nestling.data.corpus import Corpus, Tokens, prepare
from nestling.data.embedded import DOMAINS
from nestling.data.errors import DataError
from nestling.data.feed import Feed
from nestling.data.sources import Source, open_source
from nestling.data.tokenizer import TextStream, Tokenizer

__all__ = [
    "DOMAINS",
    "Corpus",
    "DataError",
    "Feed",
    "Source",
    "TextStream",
    "Tokenizer",
    "Tokens",
    "open_source",
    "prepare",
]
