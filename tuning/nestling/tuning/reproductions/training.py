"""A small model trained on a task and scored on its tests: the loop that every trained trial goes through.

Cross-entropy on the scored positions, an update rule of `nestling.optim`, warm-up and cosine, clipping; easier stages
before the task itself, chunk sizes redrawn at each step where the model's configuration says so, and an early end
when the validation examples are all right. One process, one thread: trials are what runs side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models import build
from nestling.models.hope import mixers, set_chunk_size
from nestling.optim import Levels, is_matrix
from nestling.tasks import IGNORE, Examples, Metric, Task, drawn, generator, scores
from nestling.tuning.reproductions.experiment import Outcome
from nestling.tuning.reproductions.recipe import Recipe

#: Tokens of a batch that is only scored.
SCORED_TOKENS = 8192
#: Largest number of points of a training curve that is kept.
CURVE_POINTS = 100
#: Stretches of a sequence whose loss is told apart.
STRETCHES = 16


@dataclass(frozen=True)
class Training:
    """Train a model on a task, then score it on each of the task's tests: a `Work`.

    Its metrics are the tests' names, in percent (a mean loss in bits); with `writes_off`, also "NAME, writes off": the
    same trained model with every step size of its memories at zero, the control that shows whether the memory does it.

    Attributes:
        task: what is trained at the end, and tested.
        model: configuration of the model as `nestling.models.build` takes it, without `vocab_size`.
        recipe: how it is trained.
        stages: easier tasks before it, each for a number of steps out of the recipe's; same vocabulary. One that is
            learnt as well as `recipe.stage_enough` says is left early, and leaves the rest of its steps to the next.
        writes_off: also score with the memories' writes switched off.
    """

    task: Task
    model: Mapping[str, Any]
    recipe: Recipe = field(default_factory=Recipe)
    stages: tuple[tuple[int, Task], ...] = ()
    writes_off: bool = False

    def __call__(self, seed: int) -> Outcome:
        torch.manual_seed(seed)
        body = build({**self.model, "vocab_size": self.task.vocab_size})
        model = self.task.readout(body)
        run = _Run(self, body, model, seed)
        stopped = run.train()
        tests = self.task.tests(seed)
        chance = {name: _shown(self.task.chance(name), self.task.metric_of(name)) for name in tests}
        return Outcome(
            metrics=dict.fromkeys(tests, math.nan) if stopped == "diverged" else run.test(tests),
            chance=chance | {_writes_off(name): value for name, value in chance.items()},
            tokens=run.tokens,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            validation=None if stopped == "diverged" else run.validate(),
            details={"steps": run.done, "stopped": stopped, "losses": run.curve, "scores": run.details},
        )


class _Run:
    def __init__(self, plan: Training, body: nn.Module, model: nn.Module, seed: int) -> None:
        self.plan, self.body, self.model, self.seed = plan, body, model, seed
        # Training examples, validation and the tests' own seeds stay apart for every seed.
        self.generator = generator(4 * seed + 1)
        self.validation = plan.task.validation(generator(4 * seed + 2))
        self.random = drawn(generator(4 * seed + 3))
        self.optimizer = Levels(_groups(body, model, plan.recipe))
        self.tokens = self.done = 0
        self.curve: list[tuple[int, float]] = []
        self.details: dict[str, dict[str, Any]] = {}

    def train(self) -> str:
        """Train to the end; returns why it ended: "steps", "enough" or "diverged"."""
        recipe, stages = self.plan.recipe, self.plan.stages
        keep_every = -(-recipe.steps // CURVE_POINTS)
        planned = sum(steps for steps, _ in stages)
        end = 0
        for number, (steps, task) in enumerate((*stages, (recipe.steps - planned, self.plan.task))):
            easier, end = number < len(stages), end + steps
            validation = task.validation(generator(4 * self.seed + 2)) if easier else self.validation
            enough = recipe.stage_enough if easier else recipe.enough
            rows = max(recipe.batch, recipe.batch_tokens // validation.inputs.shape[1])
            for batch in self._batches(task, end - self.done, rows):
                self.done += 1
                loss = self._step(batch, recipe.rate_factor(self.done))
                if not math.isfinite(loss):
                    return "diverged"
                if self.done % keep_every == 0 or self.done == recipe.steps:
                    self.curve.append((self.done, loss))
                if enough is not None and self.done % recipe.check_every == 0:
                    if self._score(task, validation) >= enough:
                        if not easier:
                            return "enough"
                        break
        return "steps"

    def validate(self) -> float:
        """The task's metric on the validation examples, from 0 to 1, or minus the bits: more is better."""
        return self._score(self.plan.task, self.validation)

    def _score(self, task: Task, validation: Examples) -> float:
        metric = task.metric_of("validation")
        value: float = self._scores(validation, metric)[metric]
        return -value if metric == "bits" else value

    def test(self, tests: Mapping[str, Examples]) -> dict[str, float]:
        """The task's metric on each test, as it is shown."""
        found = {}
        for name, examples in tests.items():
            metric = self.plan.task.metric_of(name)
            self.details[name] = self._scores(examples, metric)
            found[name] = _shown(self.details[name][metric], metric)
        if self.plan.writes_off:
            for mixer in mixers(self.body):
                mixer.writes = False
            for name, examples in tests.items():
                metric = self.plan.task.metric_of(name)
                found[_writes_off(name)] = _shown(self._scores(examples, metric)[metric], metric)
            for mixer in mixers(self.body):
                mixer.writes = True
        return found

    def _batches(self, task: Task, steps: int, rows: int) -> Iterator[Examples]:
        """A batch of so many rows for each step of a stage."""
        recipe = self.plan.recipe
        if recipe.examples is None:
            for _ in range(steps):
                yield task.sample(rows, self.generator)
            return
        examples, order = task.sample(recipe.examples, self.generator), torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while len(order) < rows:
                order = torch.cat([order, torch.randperm(len(examples.inputs), generator=self.generator)])
            chosen, order = order[:rows], order[rows:]
            yield Examples(*(part[chosen] for part in examples))

    def _step(self, batch: Examples, rate_factor: float) -> float:
        recipe, sizes = self.plan.recipe, self.plan.model.get("redraw_chunk_sizes")
        if sizes:
            set_chunk_size(self.body, self.random.choice(sizes))
        self.model.train()
        logits = self._logits(batch.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor
        self.optimizer.step()
        set_chunk_size(self.body, None)
        self.tokens += batch.inputs.numel()
        return loss.item()

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)[0][..., : self.plan.task.classes].float()
        return logits

    @torch.no_grad()
    def _scores(self, examples: Examples, metric: Metric) -> dict[str, Any]:
        """Every score of the examples; for bits also by position, in so many stretches of the sequence."""
        self.model.eval()
        rows = max(1, SCORED_TOKENS // max(examples.inputs.shape[1], 1))
        pieces = zip(*(part.split(rows) for part in examples), strict=True)
        if metric != "bits":
            return scores(torch.cat([self._logits(inputs).argmax(-1) for inputs, _ in pieces]), examples.targets)
        nats = [
            F.cross_entropy(self._logits(inputs).mT, targets, ignore_index=IGNORE, reduction="none")
            for inputs, targets in pieces
        ]
        bits, scored = torch.cat(nats).double() / math.log(2), examples.targets != IGNORE
        stretches = zip(bits.chunk(STRETCHES, 1), scored.chunk(STRETCHES, 1), strict=True)
        return {
            "bits": (bits.sum() / scored.sum()).item(),
            "by_position": [(part.sum() / count.sum()).item() for part, count in stretches],
        }


def _shown(value: float, metric: Metric) -> float:
    """A score as the table shows it: shares in percent."""
    return value if metric == "bits" else 100 * value


def _writes_off(test: str) -> str:
    return f"{test}, writes off"


def _groups(body: nn.Module, model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups: Continuum Memory System levels with periods of their own and the rest, matrices apart."""
    levels = body.level_parameters() if recipe.periods else []  # type: ignore[operator]
    period = dict(enumerate(recipe.periods, 1))
    level_of = {id(parameter): level for level, members in enumerate(levels, 1) for parameter in members}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        level, matrix = level_of.get(id(parameter), 0), is_matrix(name, parameter)
        peak = recipe.learning_rate if matrix or recipe.other_rate is None else recipe.other_rate
        group = groups.setdefault(
            (level, matrix),
            {
                "params": [],
                "matrix": matrix,
                "name": f"level{level}",
                "period": period.get(level, 1),
                "peak": peak,
                "optimizer": recipe.optimizer,
                **recipe.settings,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
