"""Sampling from a model's recurrent state: one token in, one token out, nothing re-read.

For a recurrent model (HOPE) memory and time per token are constant; attention's cache grows as its state does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nestling.models.continuum import Continuum
from nestling.models.fast_state import Primed
from nestling.models.skeleton import LanguageModel

#: Tokens of the prompt read at once.
PREFILL = 1024


def generate(
    model: LanguageModel | Continuum | Primed,
    prompt: Tensor,
    max_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
    stop: int | None = None,
) -> Iterator[int]:
    """An iterator over up to `max_tokens` tokens after `prompt` (T,) int64, T >= 1.

    Args:
        seed: of the draws; the same seed, prompt and model give the same text.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        stop: a token that ends the text and is not yielded.

    Raises:
        ValueError: an empty prompt, a negative temperature or count, top_k below 1.
    """
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt: got shape {tuple(prompt.shape)}, needs (T,) with at least one token")
    if max_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"got max_tokens={max_tokens}, temperature={temperature}, top_k={top_k}; "
            "needs max_tokens >= 0, temperature >= 0, top_k >= 1 or None"
        )
    return _tokens(model, prompt, max_tokens, torch.Generator().manual_seed(seed), temperature, top_k, stop)


def _tokens(
    model: LanguageModel | Continuum | Primed,
    prompt: Tensor,
    max_tokens: int,
    generator: torch.Generator,
    temperature: float,
    top_k: int | None,
    stop: int | None,
) -> Iterator[int]:
    state, unread = None, prompt[None]
    for _ in range(max_tokens):
        for piece in unread.split(PREFILL, dim=1):
            logits, state = _step(model, piece, state)
        token = _draw(logits, temperature, top_k, generator)
        if token == stop:
            return
        yield token
        unread = prompt.new_full((1, 1), token)


@torch.inference_mode()
def _step(model: LanguageModel | Continuum | Primed, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    logits, state = model(tokens, state)
    return logits[0, -1].float().cpu(), state


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite; if levels move while the model reads, lower continuum.rates")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
