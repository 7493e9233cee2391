"""`nestling generate`: text from a trained model, token by token from its recurrent state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestling.jobs.arguments import AsJson, Fast, Run, for_reading, job_for_reading, say_fast, trained_run
from nestling.jobs.output import say, verb

if TYPE_CHECKING:
    from nestling.data.tokenizer import Tokenizer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="run.dir, or continuum.drive and its settings.", show_default=False),
]
#: Control characters, which could do anything to a terminal, as their visible pictures; but newlines and tabs.
_HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


@verb("run_id", "text", "tokens", "tokens_per_second")
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to go on from; an empty one starts a document.")],
    overrides: Overrides = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same text.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many likeliest tokens only.")] = None,
    fast: Fast = True,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Print the continuation of a prompt as it comes."""
    places, changes = for_reading(overrides)
    folder = trained_run(run, places)
    continuum = job_for_reading(folder, changes).continuum

    import torch

    from nestling.checkpoint import load_final
    from nestling.evaluation.reading import reading_model
    from nestling.models import sampling

    torch.set_num_threads(1)  # a token is thousands of tiny operations: more threads only wait for each other
    model, tokenizer, _ = load_final(folder)
    reader, kept = reading_model(folder, model, continuum, fast)
    read = say_fast(kept.names if kept else None)
    ids = torch.tensor(tokenizer.encode(prompt).tolist() or [tokenizer.separator])
    stop = tokenizer.separator
    settings: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_k": top_k, "stop": stop}
    tokens = sampling.generate(reader, ids, max_tokens, **settings)
    taken: list[int] = []
    pieces: list[str] = []
    start = time.perf_counter()
    for piece in _text(tokens, tokenizer, taken):
        pieces.append(piece)
        if not as_json:
            print(piece.translate(_HARMLESS), end="", flush=True)
    speed = len(taken) / (time.perf_counter() - start)
    if not as_json:
        print()
        say(f"{len(taken)} tokens, {speed:,.0f} tokens/s", style="dim")
    return {
        "run_id": folder.run_id,
        "text": "".join(pieces),
        "tokens": len(taken),
        "tokens_per_second": speed,
        "fast_state": read,
    }


def _text(tokens: Iterator[int], tokenizer: Tokenizer, taken: list[int]) -> Iterator[str]:
    """The text of tokens as soon as it is complete; the tokens themselves are put into `taken`."""
    stream = tokenizer.stream()
    for token in tokens:
        taken.append(token)
        yield stream.push(token)
    yield stream.flush()
