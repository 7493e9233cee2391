"""Which job a resumed run trains: the one in its folder, with what may change in the middle of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from nestling.checkpoint import run_store
from nestling.config import ConfigError, JobConfig, from_yaml, to_mapping
from nestling.tracking import RunFolder
from nestling.tracking.parameters import flatten

#: Keys that a resumed run may change. All others decide what the weights, the state and the position in the data mean.
CHANGEABLE = (
    "training.*",
    "levels.*.period",
    "levels.*.unit",
    "levels.*.learning_rate",
    "continuum.*",
    "evaluation.*",
    "checkpoint.*",
    "tracking.*",
    *(f"stream.{key}" for key in ("windows_ahead", "window_bytes", "close_after", "poll_every", "settle_after")),
    *(f"stream.{key}" for key in ("dead_share", "drift_delta", "drift_threshold", "guard", "replay_share")),
    *("stream.ewc_*", "stream.rewarm_*", "stream.redecay_steps"),
    "stream.sources.*.levels",
    "data.source",
    "data.mix.*.source",
)
FIXED = ("training.batch_tokens",)
#: The same for a run adapted from a pretrained model that has not taken a step: it has weights, and nothing else.
CHANGEABLE_AT_FIRST = (
    *("seed", "training.*", "levels*", "continuum.*"),
    *("evaluation.*", "checkpoint.*", "tracking.*", "data.*"),
)
FIXED_AT_FIRST = ("data.tokenizer",)
#: What is no choice: where the run lies, and what follows from `levels`.
DERIVED = ("run.dir", "model.level_layers")


def job_of(folder: RunFolder) -> JobConfig:
    """The job of a run as it stands; ConfigError if the run has not begun."""
    if not folder.config.exists():
        raise ConfigError(f"run {folder.run_id} ({folder.name}) has no configuration: it ended before it began")
    return from_yaml(folder.config.read_text(encoding="utf-8"))


def resumed_job(folder: RunFolder, overrides: Sequence[str] = ()) -> JobConfig:
    """The job of a run that goes on.

    Raises:
        ConfigError: the run has not begun or has nothing left to do, or an override changes what cannot change.
    """
    if not folder.config.exists():
        raise ConfigError(
            f"run {folder.run_id} ({folder.name}) ended before its training began, so there is nothing to resume; "
            "start it again with nestling train"
        )
    text = folder.config.read_text(encoding="utf-8")
    before, config = from_yaml(text), from_yaml(text, overrides)
    # A runs folder may have been moved as a whole.
    config = replace(config, run=replace(config.run, dir=str(folder.path.parent)))
    done_before = _done(before, folder)
    fixed: tuple[str, ...]
    changeable, fixed = (CHANGEABLE_AT_FIRST, FIXED_AT_FIRST) if done_before == 0 else (CHANGEABLE, FIXED)
    if folder.is_stream:
        fixed = (*fixed, "data.source")  # its partitions are what the offsets belong to
    old, new = flatten(to_mapping(before)), flatten(to_mapping(config))
    for key in sorted(old.keys() | new.keys()):
        kept = key in fixed or not any(fnmatchcase(key, pattern) for pattern in changeable)
        if key not in DERIVED and old.get(key) != new.get(key) and kept:
            raise ConfigError(
                f"{key}: is {old.get(key)} in run {folder.run_id} and cannot become {new.get(key)} in the middle of "
                f"it; start a new run for that. A resumed run may change {', '.join(changeable)}, but not "
                f"{', '.join(fixed)}"
            )
    tokenizer = config.data.tokenizer
    if tokenizer != "bytes" and not Path(tokenizer).is_file() and folder.tokenizer.is_file():
        config = replace(config, data=replace(config.data, tokenizer=str(folder.tokenizer)))  # the run has its own copy
    done = _done(config, folder)
    if config.checkpoint.dir != before.checkpoint.dir and done is None and done_before is not None:
        raise ConfigError(
            f"checkpoint.dir: there is no checkpoint of run {folder.run_id} in {config.checkpoint.dir}; "
            f"move its folder {folder.path.name} there first"
        )
    if done is not None and done > config.training.last_step:
        raise ConfigError(
            f"training.steps: got {config.training.steps}, but run {folder.run_id} has taken {done} steps; give more"
        )
    info = folder.info()
    if info.get("status") == "finished" and config.training.last_step <= int(info["steps"]):
        raise ConfigError(
            f"run {folder.run_id} ({folder.name}) has finished its {info['steps']} steps; to train it further give it "
            f"more of them: nestling resume {folder.run_id} training.steps={2 * int(info['steps'])}"
        )
    return config


def _done(config: JobConfig, folder: RunFolder) -> int | None:
    """Step of the newest checkpoint."""
    return next((checkpoint.step for checkpoint in run_store(config, folder).checkpoints()), None)
