"""A model whose Continuum Memory System levels move while it reads (arXiv:2512.24695, Eq. 71-74).

Every row of the batch has level weights of its own, which start from the model's parameters. A level of period C takes
a gradient step on what it has read in each C tokens, so that the model goes on learning from the text itself. `stream`
does that and nothing else (test time); `meta` lets the outer gradient pass through the steps into the parameters, so
that training finds weights that are good to start from. Both are one computation and give the same numbers.

Token i (from 1) ends a chunk of every level whose period divides i. The error of a chunk is the sum over its C tokens
of the error in predicting each one's successor, all at the weights that the chunk has been read with; the level moves
by rate / C times it (so that rates do not depend on C; Eq. 71's eta is rate / C), visible from token i + 1. That token
is also the last one's target: the step of a chunk is made when token i + 1 comes, before it is read. A block is what
lies between two such ends of any levels. Inner gradients stay within a block: what earlier blocks have left in the
mixers' states is given. A block that comes in pieces is read a second time when it is complete; nothing else depends
on how tokens are split into calls. Memory: the graph of one block in `stream`, of the whole call in `meta`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestling.memory.checks import state_dtype
from nestling.models.component import GRADIENTS, TOKENS, Component
from nestling.models.config import ContinuumConfig, LevelsConfig, SkeletonConfig
from nestling.models.errors import ERRORS, Reading, Weights, next_token_loss, read_block
from nestling.models.fast_state import detached
from nestling.models.hope import mixers
from nestling.models.skeleton import LanguageModel

DRIVES = ("stream", "meta")


class LevelState(NamedTuple):
    """One level on its way: weights and, in the nested variant, the `start` it is reset to, each with the errors since
    it last moved (None: none yet), and the moves made so far. A level that never moves has no weights here."""

    weights: Weights
    errors: Weights | None = None
    start: Weights | None = None
    start_errors: Weights | None = None
    updates: int = 0


class ContinuumState(NamedTuple):
    """What a stream carries from call to call.

    `read` and `opened` are the model's state after the last token and before the open block, `tokens` (B, n) the open
    block so far, `position` the tokens read.
    """

    levels: tuple[LevelState, ...]
    read: Any
    opened: Any
    tokens: Tensor
    position: int = 0

    @property
    def updates(self) -> tuple[int, ...]:
        """Moves made so far by each level."""
        return tuple(level.updates for level in self.levels)


class Continuum(nn.Module):
    """A model under the same contract, `(logits, state) = continuum(tokens, state)`, whose levels move as it reads.

    The model's variant applies: in the nested one (Eq. 72) a level also sums its errors over the next slower level's
    period, at whose end its start moves by that sum at that level's rate (first order), and the level is reset to it.

    Args:
        model: a model with levels; its parameters are the starting point and are never changed here.
        periods: tokens from one step to the next, for each level, in the order of `model.level_parameters()`.
        rates: step size of each level; 0: the level stays, and costs nothing.
        drive: "stream" (no outer gradient) or "meta" (the outer gradient passes through the steps; without autograd
            recording, the same as "stream").
        error: "task" or "local", see `nestling.models.errors`.
        second_order: of "meta": also differentiate the inner gradients, which HOPE's memories can only do token by
            token (`backend="reference"`, slow). Without it they are constants to the outer gradient (first-order
            MAML).

    Raises:
        ValueError: a model without levels, or a setting that does not fit them.
    """

    def __init__(
        self,
        model: LanguageModel,
        periods: Sequence[int],
        rates: Sequence[float],
        *,
        drive: str = "stream",
        error: str = "task",
        second_order: bool = False,
    ) -> None:
        super().__init__()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [[names[id(parameter)] for parameter in level] for level in model.level_parameters()]
        self.nested = isinstance(model.config, LevelsConfig) and model.config.level_variant == "nested"
        if drive not in DRIVES:
            raise ValueError(f"drive: got {drive!r}, needs one of {', '.join(DRIVES)}")
        settings = ContinuumConfig("stream", list(periods), list(rates), error)  # type: ignore[arg-type]
        settings.check([f"level {number}" for number in range(1, len(self.names) + 1)], self.nested)
        self.model, self.drive, self.error, self.second_order = model, drive, error, second_order
        self.periods, self.rates = tuple(periods), tuple(float(rate) for rate in rates)

    @property
    def config(self) -> SkeletonConfig:
        return self.model.config

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by the model's own names (`state_dict` puts "model." before them)."""
        return self.model.named_parameters(*args, **kwargs)

    def initial_state(self, batch: int) -> ContinuumState:
        """The state before the first token, for `batch` rows."""
        parameters = dict(self.model.named_parameters())
        levels = []
        for number, names in enumerate(self.names):
            moving = names if self.rates[number] or self._slower(number) else []
            weights = {name: _widened(parameters[name]).expand(batch, *parameters[name].shape) for name in moving}
            levels.append(LevelState(weights, start=weights if self._slower(number) else None))
        read = self.model.initial_state(batch)
        tokens = torch.empty(batch, 0, dtype=torch.int64, device=next(iter(parameters.values())).device)
        return ContinuumState(tuple(levels), read, read, tokens)

    def forward(self, tokens: Tensor, state: ContinuumState | None = None) -> tuple[Tensor, ContinuumState]:
        """Logits (B, T, V) for tokens (B, T), and the state after them.

        Raises:
            ValueError: tokens that are not (B, T) int64, a state of another model or batch, a model that recomputes
                activations (the level weights of the time are gone by then).
            RuntimeError: "meta" with `second_order` through an operation that has no second derivative.
        """
        outer = self.drive == "meta" and torch.is_grad_enabled()
        twice = outer and self.second_order and self._moving()
        operations = _with_second_derivatives(self.model) if twice else nullcontext()
        with torch.inference_mode(False), torch.set_grad_enabled(outer), operations:
            tokens = tokens.clone() if tokens.is_inference() else tokens
            self._check_call(tokens, state)
            state = self.initial_state(len(tokens)) if state is None else state
            logits = []
            for piece, successor in self._pieces(tokens, state.position):
                read, state = self._read(piece, successor, state, outer)
                logits.append(read)
            return torch.cat(logits, dim=1), state

    def components(self, tokens: int, names: Sequence[str]) -> list[Component]:
        """What learns while it reads one sequence of `tokens` tokens: the model's own, and levels by these names."""
        own = [part for number, name in enumerate(names) for part in self._level_components(number, name, tokens)]
        return [*self.model.components(tokens), *own]

    def role(self, name: str) -> str:
        """What the parameter `name` is for; a level that moves here begins with its own."""
        moving = {name for level in self.initial_state(1).levels for name in level.weights}
        return f"initial {self.model.role(name)}" if name in moving else self.model.role(name)

    def _level_components(self, number: int, name: str, tokens: int) -> Iterator[Component]:
        """The level's weights in context, what they are reset to, and the errors kept until either moves.

        Operations are those of the level's own layers: reading, the gradients of inputs and weights, the steps.
        """
        weights = self.initial_state(1).levels[number].weights.values()
        numbers, size = sum(map(torch.numel, weights)), sum(weight.nbytes for weight in weights)
        rate, slower = self.rates[number], self._slower(number)
        rule = "gradient descent" if self.error == "task" else "Delta Gradient Descent in each layer (Eq. 57)"
        # Name, tokens from one move to the next, equation, whether it sums up errors itself, reads of a weight a token.
        problems = [(name, self.periods[number], "(Eq. 71)", True, 1)] if rate else []
        if slower:
            problems += [] if rate else [(name, slower[1], "(Eq. 72)", False, 1)]
            problems += [(f"{name}: start", slower[1], "(Eq. 72)", True, 0)]
        ends = [end for end in range(1, tokens) if self._at_end(end)]
        for called, every, equation, sums, reads in problems:
            often = (tokens - 1) // every / tokens
            yield Component(
                name=called,
                context=TOKENS,
                objective=f"next-token loss of {every:,} tokens {equation}",
                rule=f"{rule} {equation}",
                updates_per_token=often,
                state_bytes=size,
                flops_per_token=2.0 * numbers * (3 * reads + often),
            )
            if sums and any(end % every for end in ends):
                yield Component(
                    name=f"{called}: accumulator",
                    context=GRADIENTS,
                    objective="−⟨a, g⟩ over a period",
                    rule="sum of the blocks' g (Eq. 71)",
                    updates_per_token=len(ends) / tokens,
                    state_bytes=size,
                    flops_per_token=numbers * len(ends) / tokens,
                )

    def _read(
        self, piece: Tensor, successor: Tensor, state: ContinuumState, outer: bool
    ) -> tuple[Tensor, ContinuumState]:
        """Read a piece of one block; `successor` (B, 1) is the token after it, (B, 0) if that is yet to come."""
        if self._at_end(state.position) and state.tokens.shape[1] and piece.shape[1]:
            with torch.enable_grad():
                again = self._run(state.levels, state.tokens, state.opened)
            levels = self._moved(state, again, torch.cat([state.tokens[:, 1:], piece[:, :1]], dim=1), outer)
            state = state._replace(levels=levels, opened=state.read, tokens=state.tokens[:, :0])
        position = state.position + piece.shape[1]
        whole = self._at_end(position) and successor.shape[1] > 0 and state.tokens.shape[1] == 0
        with torch.set_grad_enabled(outer or whole):
            reading = self._run(state.levels, piece, state.read)
        if not whole:
            kept = torch.cat([state.tokens, piece], dim=1) if self._moving() else state.tokens
            return reading.logits, state._replace(read=reading.after, tokens=kept, position=position)
        state = state._replace(position=position)
        levels = self._moved(state, reading, torch.cat([piece[:, 1:], successor], dim=1), outer)
        logits, after = (reading.logits, reading.after) if outer else detached((reading.logits, reading.after))
        return logits, state._replace(levels=levels, read=after, opened=after)

    def _run(self, levels: Sequence[LevelState], tokens: Tensor, read: Any) -> Reading:
        return read_block(self.model, [level.weights for level in levels], tokens, read, self.error == "local")

    def _moved(self, state: ContinuumState, reading: Reading, targets: Tensor, outer: bool) -> tuple[LevelState, ...]:
        """The levels after a block has come to its end at `state.position`."""
        with torch.enable_grad():
            loss = next_token_loss(reading.logits, targets)
        second = outer and self.second_order
        gradients_at = partial(torch.autograd.grad, loss, create_graph=second, retain_graph=outer)
        errors = ERRORS[self.error](gradients_at, reading, self.rates)
        return tuple(
            self._stepped(number, level, error, state.position)
            for number, (level, error) in enumerate(zip(state.levels, errors, strict=True))
        )

    def _stepped(self, number: int, level: LevelState, error: Weights, position: int) -> LevelState:
        """Take in a block's errors; step at the end of the level's chunk; reset at the end of the slower level's."""
        rate, period, slower = self.rates[number], self.periods[number], self._slower(number)
        if rate:
            level = level._replace(errors=_sum(level.errors, error))
            if position % period == 0:
                weights = _step(level.weights, level.errors, rate / period)
                level = level._replace(weights=weights, errors=None, updates=level.updates + 1)
        if slower:
            level = level._replace(start_errors=_sum(level.start_errors, error))
            if position % slower[1] == 0:
                start = _step(level.start, level.start_errors, slower[0] / slower[1])
                level = level._replace(weights=start, start=start, start_errors=None)
        return level

    def _slower(self, number: int) -> tuple[float, int] | None:
        """Rate and period of the level that learns what this one is reset to; None without one, or if neither moves."""
        if not self.nested or number + 1 == len(self.rates) or not any(self.rates[number : number + 2]):
            return None
        return self.rates[number + 1], self.periods[number + 1]

    def _moving(self) -> list[int]:
        """The periods at whose ends something moves or is reset."""
        slower = (self._slower(number) for number in range(len(self.rates)))
        moving = [period for period, rate in zip(self.periods, self.rates, strict=True) if rate]
        return moving + [each[1] for each in slower if each]

    def _at_end(self, position: int) -> bool:
        return any(position % period == 0 for period in self._moving())

    def _pieces(self, tokens: Tensor, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens cut at the ends of blocks, each piece with the token after it."""
        start, total = 0, tokens.shape[1]
        while True:
            left = [period - (position + start) % period for period in self._moving()]
            end = min([start + each for each in left] + [total])
            yield tokens[:, start:end], tokens[:, end : end + 1]
            if end == total:
                return
            start = end

    def _check_call(self, tokens: Tensor, state: ContinuumState | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, needs (B, T)")
        if self.model.activation_checkpointing:
            raise ValueError("model.activation_checkpointing: got True, levels that move while reading need False")
        if state is None:
            return
        if not isinstance(state, ContinuumState):
            raise ValueError(f"state: got {type(state).__name__}, needs the state that a Continuum has given back")
        if len(state.levels) != len(self.names) or len(state.tokens) != len(tokens):
            raise ValueError(
                f"state: got {len(state.levels)} levels of {len(state.tokens)} rows, needs {len(self.names)} of "
                f"{len(tokens)}; it is another model's or batch's"
            )


def with_moving_levels(model: LanguageModel, config: ContinuumConfig) -> LanguageModel | Continuum:
    """The model as it reads a text by this configuration: with levels that move, or (drive "schedule") as it is.

    Raises:
        ValueError: see `Continuum`.
    """
    if config.drive == "schedule":
        return model
    settings: dict[str, Any] = {"drive": config.drive, "error": config.error, "second_order": config.second_order}
    return Continuum(model, config.periods, config.rates, **settings)


@contextmanager
def _with_second_derivatives(model: LanguageModel) -> Iterator[None]:
    """Attention written as matrix products, and memories as the token loop: what is fused has one derivative only."""
    layers = [layer for layer in mixers(model) if layer.backend == "auto"]
    for layer in layers:
        layer.backend = "reference"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for layer in layers:
            layer.backend = "auto"


def _widened(parameter: Tensor) -> Tensor:
    """Level weights move by small steps: float32 or wider."""
    return parameter.to(state_dtype(parameter.dtype))


def _sum(errors: Weights | None, more: Weights) -> Weights:
    return more if errors is None else {name: error + more[name] for name, error in errors.items()}


def _step(weights: Weights | None, errors: Weights | None, rate: float) -> Weights:
    assert weights is not None and errors is not None
    return {name: weight - rate * errors[name] for name, weight in weights.items()}
