"""How fast data comes: `python tests/benchmarks/feed.py [--json FILE]`.

Measures, on one core each, the tokens a second that `Feed` gives out (one source; a mix of two; the batches of the
quickstart job), that preparing reads, cuts and tokenises without Ray's parallelism (bytes; a BPE of 4,096 tokens), and,
for comparison, that the quickstart model trains on (forward and backward pass). Times are CPU seconds of this process,
medians of the repeats, which take turns. Target: the feed gives at least ten times what the model takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nestling.config import DataConfig, MixConfig, load
from nestling.data import Corpus, Feed, Tokenizer, open_source, prepare
from nestling.data.bpe import train_tokenizer
from nestling.models import build

ENGLISH, PYTHON = "embedded:english", "embedded:python"
#: Batches a repeat.
BATCHES = 2000


def feeding(corpus: Corpus, length: int, sequences: int) -> Callable[[], int]:
    """Reads batches one after another, as a worker does; returns how many tokens."""
    feed, numbers = Feed(corpus, length, sequences, seed=0), itertools.count()

    def step() -> int:
        for number in itertools.islice(numbers, BATCHES):
            feed.batch(number)
        return BATCHES * sequences * length

    return step


def tokenising(tokenizer: Tokenizer) -> Callable[[], int]:
    """Reads, cuts and tokenises the English text in this process."""
    source = open_source(ENGLISH)

    def step() -> int:
        documents = (document for shard in source.shards for document in source.read(shard))
        return sum(len(tokenizer.encode(document.text)) for document in documents)

    return step


def training(corpus: Corpus) -> Callable[[], int]:
    """Forward and backward passes of the quickstart model, a batch of it at a time."""
    config = load("jobs/quickstart.yaml")
    length, sequences = config.data.sequence_length, config.training.batch_tokens // config.data.sequence_length
    config.model.vocab_size = corpus.tokenizer.vocab_size
    model, feed = build(config.model), Feed(corpus, length, sequences, seed=0)

    def step() -> int:
        for number in range(4):
            inputs, targets = map(torch.from_numpy, feed.batch(number))
            F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).backward()
        return 4 * config.training.batch_tokens

    return step


def tokens_per_second(steps: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            tokens = step()
            rates[name].append(tokens / (time.process_time() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def measure(cache: Path, repeats: int) -> dict[str, float]:
    english = prepare(DataConfig(source=ENGLISH), cache)
    mix = prepare(DataConfig(mix=[MixConfig(ENGLISH, weight=3.0), MixConfig(PYTHON, weight=1.0)]), cache)
    bpe = train_tokenizer(open_source(ENGLISH), 4096, heldout_percent=10).tokenizer
    steps = {
        "feed, one source, 8 x 1024": feeding(english, 1024, 8),
        "feed, mix of two, 8 x 1024": feeding(mix, 1024, 8),
        "feed, one source, 2 x 256 (quickstart)": feeding(english, 256, 2),
        "feed, mix of two, 2 x 256": feeding(mix, 256, 2),
        "reading and tokenising, bytes": tokenising(Tokenizer.bytes()),
        "reading and tokenising, BPE of 4096": tokenising(bpe),
        "quickstart model, forward and backward": training(english),
    }
    return tokens_per_second(steps, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as cache:
        rates = measure(Path(cache), options.repeats)
    model = rates["quickstart model, forward and backward"]
    slowest = min(rate for name, rate in rates.items() if name.startswith("feed"))
    for name, rate in rates.items():
        print(f"{name:<40} {rate:>14,.0f} tokens/s {rate / model:>9,.1f} times the model")
    facts = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    if options.json:
        result = facts | {"tokens_per_second": rates, "slowest_feed_over_model": slowest / model}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
