"""The six tasks of the Mechanistic Architecture Design benchmark (Poli et al. 2024, arXiv:2403.17844), baseline sizes.

arXiv:2512.24695, Table 4 reports five of them. Recall is trained on the next token of the whole sequence and tested on
the values of keys that were seen before; every task is scored by accuracy averaged over the classes. Rules follow the
benchmark's published generators; the random numbers are torch's, so single sequences differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from nestling.tasks.task import IGNORE, Examples, Task, drawn, generator

#: Seed of the one map from keys to values that all memorisation data share.
MAP_SEED = 12345


@dataclass(frozen=True)
class MadTask(Task):
    """What the six share: one test set of examples from the same rule.

    Attributes:
        vocabulary: tokens, the special ones included.
        length: tokens of a sequence.
        test_examples: size of the test set.
    """

    metric = "macro_accuracy"
    vocabulary: int = 16
    length: int = 128
    test_examples: int = 1280

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def tests(self, seed: int) -> dict[str, Examples]:
        return {"test": self.validation(generator(4 * seed), self.test_examples)}


@dataclass(frozen=True)
class InContextRecall(MadTask):
    """Key-value pairs whose map is new in each sequence; the value of a key that was seen before has to be known.

    The lower half of the vocabulary are keys, the upper half values (with `noise_tokens` more behind them). Each key is
    uniform with replacement, each value uniform; the last pair repeats an earlier key. Inputs have `length - 1` tokens:
    the last value is only a target. Chance: one of the values.

    Attributes:
        noise_tokens: tokens of the vocabulary that are neither key nor value.
        noise: probability that a pair is replaced by two noise tokens.
    """

    name = "in-context recall"
    noise_tokens: int = 0
    noise: float = 0.0

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        tokens, _ = self._sequences(count, generator)
        return Examples(tokens[:, :-1], tokens[:, 1:])

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        tokens, scored = self._sequences(count, generator)
        return Examples(tokens[:, :-1], tokens.masked_fill(~scored, IGNORE)[:, 1:])

    def chance(self, test: str) -> float:
        return 1 / self._values

    @property
    def _keys(self) -> int:
        return (self.vocabulary - self.noise_tokens) // 2

    @property
    def _values(self) -> int:
        return self.vocabulary - self.noise_tokens - self._keys

    def _sequences(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (count, length), and which of them are values of keys seen before."""
        pairs = self.length // 2 - 1
        keys = torch.randint(self._keys, (count, pairs), generator=generator)
        real = torch.rand(count, pairs, generator=generator) >= self.noise
        real.scatter_(1, torch.randint(pairs, (count, 1), generator=generator), True)  # one pair at least
        shown = (nn.functional.one_hot(keys, self._keys) * real.unsqueeze(-1)).cumsum(1) > 0
        last = torch.multinomial(shown[:, -1].float(), 1, generator=generator)
        keys, real = torch.cat([keys, last], 1), torch.cat([real, torch.ones_like(last, dtype=torch.bool)], 1)
        mapped = self._keys + torch.randint(self._values, (count, self._keys), generator=generator)
        tokens = torch.stack([keys, mapped.gather(1, keys)], -1)
        if self.noise_tokens:
            noise = torch.randint(self.noise_tokens, tokens.shape, generator=generator)
            tokens = torch.where(real.unsqueeze(-1), tokens, self.vocabulary - self.noise_tokens + noise)
        before = torch.cat([torch.zeros_like(shown[:, :1]), shown], 1).gather(2, keys.unsqueeze(-1)).squeeze(-1)
        again = before & real
        return tokens.flatten(1), torch.stack([torch.zeros_like(again), again], -1).flatten(1)


@dataclass(frozen=True)
class NoisyRecall(InContextRecall):
    """In-context recall in which some pairs are noise, from tokens of their own."""

    name = "noisy recall"
    vocabulary: int = 32
    noise_tokens: int = 16
    noise: float = 0.2


@dataclass(frozen=True)
class FuzzyRecall(MadTask):
    """In-context recall whose keys and values are tuples of one to `longest` distinct tokens, uniform by size.

    Test keys always have the longest size. The last token is padding, on the left; keys take the lower half of the
    others. One probe pair is sure to be in the sequence and stands again at its end. Chance: one of the value tokens.
    """

    name = "fuzzy recall"
    longest: int = 3

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        random, sizes = drawn(generator), range(1, self.longest + 1)
        tokens = torch.stack([self._sequence(random, sizes)[0] for _ in range(count)])
        return Examples(tokens[:, :-1], tokens[:, 1:])

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        random = drawn(generator)
        made = [self._sequence(random, range(self.longest, self.longest + 1)) for _ in range(count)]
        tokens, targets = (torch.stack(part) for part in zip(*made, strict=True))
        return Examples(tokens[:, :-1], targets[:, 1:])

    def chance(self, test: str) -> float:
        return 1 / (self.vocabulary - 1 - self._keys)

    @property
    def _keys(self) -> int:
        return (self.vocabulary - 1) // 2

    def _sequence(self, random: Random, key_sizes: range) -> tuple[Tensor, Tensor]:
        """Tokens (length + 1,) and, in a second one, the value tokens of keys seen before."""
        keys, values = range(self._keys), range(self._keys, self.vocabulary - 1)
        key_size, value_size = random.choice(key_sizes), random.randint(1, self.longest)
        probe, answer = tuple(random.sample(keys, key_size)), random.sample(values, value_size)
        room, longest_pair = self.length - key_size - value_size, 2 * self.longest
        place = random.randrange(room - key_size - value_size)
        bound: dict[tuple[int, ...], list[int]] = {}
        tokens: list[int] = []
        targets: list[int] = []
        while len(tokens) < room - longest_pair or probe not in bound:
            if len(tokens) >= min(place, room - 2 * longest_pair) and probe not in bound:
                key = probe
            else:
                key = tuple(random.sample(keys, random.choice(key_sizes)))
            value = bound.get(key)
            targets += [IGNORE] * len(key)
            if value is None:
                value = answer if key == probe else random.sample(values, random.randint(1, self.longest))
                bound[key] = value
                targets += [IGNORE] * len(value)
            else:
                targets += value
            tokens += [*key, *value]
        tokens += [*probe, *answer]
        targets += [IGNORE] * key_size + answer
        padding = self.length + 1 - len(tokens)
        return (
            torch.tensor([self.vocabulary - 1] * padding + tokens),
            torch.tensor([IGNORE] * padding + targets),
        )


@dataclass(frozen=True)
class SelectiveCopying(MadTask):
    """Tokens among blanks, to be said again in their order after a copy token.

    The last token of the vocabulary is the copy token, the one before it the blank. Each blank falls into a random gap
    before one of the tokens. Scored are the last `copied` positions. Chance: one of the other tokens.

    Attributes:
        copied: tokens to copy.
    """

    name = "selective copying"
    length: int = 256
    copied: int = 16

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        copy, blank = self.vocabulary - 1, self.vocabulary - 2
        content = torch.randint(self.vocabulary - 2, (count, self.copied), generator=generator)
        blanks = self.length - 2 * self.copied - 1
        gaps = torch.randint(self.copied, (count, blanks), generator=generator)
        before = nn.functional.one_hot(gaps, self.copied).sum(1).cumsum(1)  # blanks before each token
        inputs = torch.full((count, self.length), blank)
        inputs.scatter_(1, before + torch.arange(self.copied), content)
        inputs[:, -self.copied - 1] = copy
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -self.copied :] = content
        return Examples(inputs, targets)

    def chance(self, test: str) -> float:
        return 1 / (self.vocabulary - 2)


@dataclass(frozen=True)
class Memorisation(MadTask):
    """One fixed map from keys to values for all sequences: after each key, at the insert token, its value is due.

    The last token is the insert token, the lower half of the others are keys. Nothing in the context helps: the map has
    to be in the weights. Chance: one of the values.
    """

    name = "memorisation"
    vocabulary: int = 256
    length: int = 32

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        values = self.map()
        keys = torch.randint(len(values), (count, self.length // 2), generator=generator)
        inputs = torch.stack([keys, torch.full_like(keys, self.vocabulary - 1)], -1).flatten(1)
        targets = torch.stack([torch.full_like(keys, IGNORE), values[keys]], -1).flatten(1)
        return Examples(inputs, targets)

    def map(self) -> Tensor:
        """The value of each key, (keys,)."""
        keys = (self.vocabulary - 1) // 2
        values = torch.arange(keys, self.vocabulary - 1)
        return values[torch.randperm(len(values), generator=generator(MAP_SEED))][:keys]

    def chance(self, test: str) -> float:
        return 1 / (self.vocabulary - 1 - (self.vocabulary - 1) // 2)


@dataclass(frozen=True)
class Compression(MadTask):
    """Random tokens and a compression token; all of them must be told from the model's last hidden state alone.

    The model is read through `Decoder`. Chance: the compression token is known, of the others one in vocabulary - 1.
    """

    name = "compression"
    length: int = 32

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        tokens = torch.randint(self.vocabulary - 1, (count, self.length), generator=generator)
        tokens[:, -1] = self.vocabulary - 1
        return Examples(tokens, tokens)

    def chance(self, test: str) -> float:
        return 2 / self.vocabulary  # vocabulary - 1 classes at 1 / (vocabulary - 1), one at 1

    def readout(self, model: nn.Module) -> nn.Module:
        return Decoder(model, self.vocabulary)


class Decoder(nn.Module):
    """Every input token from the last hidden state: a two-layer perceptron on the state plus a sinusoidal position.

    Args:
        model: a language model; its head is taken off.
        classes: logits of each position.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        config: Any = model.config
        width = config.width
        model.head = nn.Identity()
        self.model = model
        layers = [nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.RMSNorm(width), nn.Linear(width, width)]
        self.decoder = nn.Sequential(*layers, nn.GELU(), nn.RMSNorm(width), nn.Linear(width, classes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Logits (N, T, classes) for tokens (N, T)."""
        last = self.model(tokens)[0][:, -1:]
        return self.decoder(last + positions(tokens.shape[1], last.shape[-1]).to(last)), None


def positions(length: int, width: int) -> Tensor:
    """Sinusoidal codes (length, width) of positions (Vaswani et al. 2017); an even width."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 2) / max(width // 2 - 1, 1))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


#: The six, in the order of the paper's table, with noisy recall behind the recall that it varies.
MAD: tuple[type[MadTask], ...] = (
    Compression,
    InContextRecall,
    NoisyRecall,
    FuzzyRecall,
    SelectiveCopying,
    Memorisation,
)
