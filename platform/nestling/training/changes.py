"""Levels that are added to a run, and levels that move at another period from now on, without beginning anew.

A change is one of the configuration: `config.yaml` is replaced as a whole, and a snapshot from before is read as
`nestling.checkpoint.grown` says, so that a crash leaves the old levels or the new. A change to a live stream waits in
`changes.json` of the run's folder: at the next snapshot the workers end, the driver takes the change up, and they go
on. Steps go on being counted: a level moves at the next step that its period divides, by all that it has gathered since
it last moved. So a half-filled accumulator stays as it is under another period, and a new level, which has gathered
nothing, keeps time with the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from nestling.config import ConfigError, JobConfig, LevelConfig, to_yaml
from nestling.models import build
from nestling.models.config import LevelsConfig
from nestling.models.skeleton import LanguageModel
from nestling.optim.levels import tokens_per_move
from nestling.tracking import RunFolder
from nestling.tracking.files import locked, read_json, replace_json
from nestling.tracking.runs import RunBusyError
from nestling.training.groups import parameter_groups
from nestling.training.resume import job_of

#: The status of workers that end for a change to be taken up; they go on from the snapshot that they have saved.
CHANGED = "changed"
#: Seconds to wait for another process that asks for a change or takes one up.
PATIENCE = 10.0


@dataclass(frozen=True)
class LevelChange:
    """A level moves at another period, or, where a width is given, is added.

    Attributes:
        level: the level's name.
        period: steps or tokens (the unit that the level has; steps for a new one) from one move to the next.
        width: hidden width of the new level's MLP in each block.
    """

    level: str
    period: int
    width: int | None = None

    def applied(self, config: JobConfig) -> JobConfig:
        """The job with the change; the same job if it has it already.

        Raises:
            ConfigError: it cannot have it.
        """
        known = [level.name for level in config.levels]
        if self.level in known and self.width is not None:
            return config
        try:
            levels = self._moved(config) if self.level in known else self._added(config)
            changed = replace(config, levels=levels, model=replace(config.model))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
        with torch.device("meta"):
            model = build(changed.model)
        assert isinstance(model, LanguageModel)
        parameter_groups(model, changed)
        return changed

    def _moved(self, config: JobConfig) -> list[LevelConfig]:
        return [replace(each, period=self.period) if each.name == self.level else each for each in config.levels]

    def _added(self, config: JobConfig) -> list[LevelConfig]:
        """The levels with the new one behind those that are as fast or faster: the residual stream passes the fastest
        first (Eq. 70)."""
        if self.width is None:
            names = ", ".join(str(level.name) for level in config.levels) or "none; nestling level add makes one"
            raise ConfigError(f"level {self.level}: there is no such level; there are: {names}")
        _check_chain(config)
        level = LevelConfig(width=self.width, period=self.period, name=self.level)
        tokens = config.training.batch_tokens
        chain = [place for place, other in enumerate(config.levels) if other.width is not None]
        if config.model.level_variant == "nested":  # type: ignore[attr-defined]
            _check_chain_is_free(config, {str(config.levels[place].name) for place in chain})
        slower = [place for place in chain if _every(config.levels[place], tokens) > _every(level, tokens)]
        if slower and config.model.level_variant == "nested":  # type: ignore[attr-defined]
            raise ConfigError(
                f"period of {self.level}: got {self.period}, needs a multiple of the slowest level's: with "
                "model.level_variant=nested, a level between others would change what these are reset to"
            )
        place = slower[0] if slower else max(chain, default=len(config.levels) - 1) + 1
        return [*config.levels[:place], level, *config.levels[place:]]


def free_name(folder: RunFolder) -> str:
    """A name for a new level: level1, level2, ..., the first that no level has or will have."""
    taken = {str(level.name) for level in _expected(folder).levels}
    return next(name for number in range(1, len(taken) + 2) if (name := f"level{number}") not in taken)


def level_called(folder: RunFolder, level: str) -> LevelConfig:
    """The level of a run, as it will be, with a name or a number (1 is the first, and so the fastest).

    Raises:
        ConfigError: there is none.
    """
    levels = _expected(folder).levels
    for number, found in enumerate(levels, 1):
        if level in (found.name, str(number)):
            return found
    if not levels:
        raise ConfigError(f"run {folder.run_id} ({folder.name}) has no levels; nestling level add makes one")
    names = ", ".join(str(found.name) for found in levels)
    raise ConfigError(f"LEVEL: got {level!r}, needs one of {names}, or a number from 1 to {len(levels)}")


def change_levels(folder: RunFolder, change: LevelChange) -> bool:
    """Change the levels of a run: at once, or (False) at its next snapshot if it is a stream that is running.

    Raises:
        ConfigError: the change cannot be, or changes nothing, or the run has not begun or has finished.
        RunBusyError: it is a training, and running.
    """
    try:
        with folder.claim():
            _ask(folder, change)
            take_up(folder, job_of(folder))
            return True
    except RunBusyError:
        if not folder.is_stream:
            raise
    _ask(folder, change)
    return False


def pending(folder: RunFolder) -> list[LevelChange]:
    """The changes that were asked for and are not taken up yet."""
    return [LevelChange(**change) for change in read_json(folder.changes).get("changes", [])]


def take_up(folder: RunFolder, config: JobConfig) -> JobConfig:
    """Make what was asked for the run's configuration, and part of `config`, the job that its driver works on.

    Raises:
        ConfigError: the job as it is now cannot have it.
    """
    if not folder.changes.exists():
        return config
    with _alone(folder):
        changes, stored = pending(folder), job_of(folder)
        try:
            for change in changes:
                stored, config = change.applied(stored), change.applied(config)
        except ConfigError as error:
            raise ConfigError(f"{error}; {folder.changes} asks for it: remove that file to go on without") from error
        folder.write_config(to_yaml(stored))
        for change in changes:
            level = next(level for level in stored.levels if level.name == change.level)
            new = "moves" if change.width is None else f"of width {change.width} is added and moves"
            message = f"{change.level} {new} every {change.period} {level.unit} from now on"
            folder.event("levels", message, **asdict(change))
        folder.changes.unlink()
    return config


def _ask(folder: RunFolder, change: LevelChange) -> None:
    """Write down a change that can be."""
    if folder.status() == "finished":
        again = f"nestling {'stream --resume' if folder.is_stream else 'resume'} {folder.run_id}"
        raise ConfigError(
            f"run {folder.run_id} ({folder.name}) has finished; go on with it first ({again} training.steps=N), then "
            "change its levels"
        )
    with _alone(folder):
        before = _expected(folder)
        if change.applied(before) == before:
            done = f"moves every {change.period} already" if change.width is None else "is the name of a level already"
            raise ConfigError(f"{change.level}: {done}; give another")
        changes = [asdict(each) for each in (*pending(folder), change)]
        replace_json(folder.changes, {"changes": changes})


def _expected(folder: RunFolder) -> JobConfig:
    """The run's job with all that was asked for."""
    config = job_of(folder)
    for change in pending(folder):
        config = change.applied(config)
    return config


@contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """While the block runs, nobody else asks for a change or takes one up."""
    with locked(folder.changes.with_suffix(".lock"), PATIENCE):
        yield


def _check_chain(config: JobConfig) -> None:
    """Whether a block's residual stream passes one level after another, so that one more can leave it as it is."""
    model = config.model
    if not isinstance(model, LevelsConfig):
        raise ConfigError(f"model.name: is {model.name}, which has no Continuum Memory System that could get a level")
    if getattr(model, "mlp_width", None) is not None:
        raise ConfigError("model.mlp_width: a block has one MLP, whole layers are levels, and no level can be added")
    if model.level_variant == "independent":
        raise ConfigError(
            "model.level_variant: is independent, where one sum goes over all levels; its rounding changes with their "
            "number, so none can be added without changing what the model says"
        )
    if config.continuum.drive != "schedule":
        raise ConfigError(
            f"continuum.drive: is {config.continuum.drive}, with a period and a rate for each of the levels that the "
            "run began with; levels can be added with continuum.drive=schedule"
        )


def _check_chain_is_free(config: JobConfig, chain: set[str]) -> None:
    """Whether no source's policy names the levels of a nested chain: of a longer one it would name some, not all."""
    for place, (name, allowed) in enumerate(config.stream.policies.items()):
        if named := chain & set(allowed or ()):
            raise ConfigError(
                f"stream.sources.{place}.levels: names {', '.join(sorted(named))}, and with model.level_variant=nested "
                f"{name} may write all levels or none, so a level more would not fit; go on with the run once with "
                f"stream.sources.{place}.levels=null (every level) or [] (none), then add the level"
            )


def _every(level: LevelConfig, tokens_per_step: int) -> int:
    """Tokens from one move to the next."""
    return tokens_per_move({"period": level.period, "unit": level.unit}, tokens_per_step)
