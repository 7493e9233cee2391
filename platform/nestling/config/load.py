"""Job files and overrides: from what a person wrote to a checked `JobConfig`, and back to YAML.

A job file is YAML; `key=value` overrides change it before anything is checked, so that file and overrides follow the
same rules. Whatever is wrong is a `ConfigError` before anything starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nestling.config.build import ConfigError, build, holds_text, model_class, unknown_key
from nestling.config.optimizers import MATRIX_OPTIMIZERS
from nestling.config.schema import JobConfig
from nestling.models.config import LevelsConfig

log = logging.getLogger(__name__)

#: How sources begin that only a stream can have.
STREAMS = ("kafka://", "python:", "embedded:five-domains")


def load(job: str | Path, overrides: Sequence[str] = (), streamed: bool | None = None) -> JobConfig:
    """Reads a job file, applies overrides such as `training.steps=100` or `levels.0.period=4`, and checks the result.

    `job` is a path, or the bare name of a file in `jobs/` of the current folder ("quickstart"); `streamed` says whether
    its data is to be read as a stream, None: as what it is. Raises ConfigError.
    """
    given = read_job(job, overrides)
    config = build(given)
    _check_tracking(config)
    _check_data(config, streamed)
    _say_what_is_unused(given, config)
    return config


def read_job(job: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A job file with overrides as plain mappings, for `build`; nothing is checked yet. Raises ConfigError."""
    return _override(read_yaml(_find(job)), overrides)


def changed(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a job's mappings with other values at dotted keys. Raises ConfigError for one that cannot be there."""
    copy = deepcopy(dict(given))
    _switch_model(copy, list(changes.items()))
    for key, value in changes.items():
        change(copy, key, value)
    return copy


def is_streamed(config: JobConfig) -> bool:
    """Whether a job learns from a stream by its nature: its data or its steps have no end that is known."""
    return config.stream.sources is not None or config.training.steps is None or config.data.source.startswith(STREAMS)


def to_mapping(config: JobConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, every default filled in."""
    mapping = asdict(config)
    mapping["training"]["betas"] = list(config.training.betas)
    return mapping


def to_yaml(config: JobConfig) -> str:
    """The resolved configuration as YAML, itself a job file."""
    return OmegaConf.to_yaml(OmegaConf.create(to_mapping(config)))


def from_yaml(text: str, overrides: Sequence[str] = ()) -> JobConfig:
    """The inverse of `to_yaml`, with overrides; the data need not be there. Raises ConfigError."""
    return build(_override(_parse(text, "the configuration"), overrides))


def parse_override(override: str) -> tuple[str, Any]:
    """Splits `key=value`; the value is YAML, but a text stands for itself (and `null` for None). Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override}: is no override, needs key=value, for example training.steps=100")
    if holds_text(key):
        return key, None if text == "null" else text
    try:
        return key, _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}: the value {text!r} is no YAML: {_on_one_line(error)}") from error


def pick(overrides: Sequence[str], *allowed: str) -> dict[str, str]:
    """The overrides of a verb that takes only the `allowed` keys, as texts. Raises ConfigError for any other key."""
    picked = {}
    for override in overrides:
        key, value = parse_override(override)
        if key not in allowed:
            raise unknown_key(key, allowed)
        if value in (None, ""):
            raise ConfigError(f"{key}: got no value; give one, or leave {key} out for its default")
        picked[key] = str(value)
    return picked


def is_job(text: str) -> bool:
    """Whether a text names a job file, or would if it existed, rather than a run."""
    path = Path(text)
    return path.suffix in (".yaml", ".yml") or path.is_file() or _shipped(path).is_file()


def _shipped(path: Path) -> Path:
    """The file in ./jobs that a bare name stands for."""
    return Path("jobs") / f"{path.name}.yaml" if path.name == str(path) else path


def _find(job: str | Path) -> Path:
    path = Path(job)
    for file in (path, _shipped(path)):
        if file.is_file():
            return file
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, needs a job file (YAML)")
    names = ", ".join(sorted(file.stem for file in Path("jobs").glob("*.yaml"))) or "none (there is no jobs/*.yaml)"
    raise ConfigError(f"{path}: no such job file; give a path, or the name of a job in ./jobs: {names}")


def read_yaml(path: Path, what: str = "a job file") -> dict[str, Any]:
    """The mappings in a YAML file, which is `what`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as {what}: {error}") from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        given = _plain(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: is no valid YAML: {_on_one_line(error)}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: holds a list, needs a mapping of sections (model:, training:, ...)")
    return given


def _plain(parsed: Any) -> Any:
    """Dictionaries and lists of what OmegaConf parsed; `${...}` stays text until the whole job is there."""
    return OmegaConf.to_container(parsed, resolve=False)


def _override(given: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    changes = [parse_override(override) for override in overrides]
    dropped = _switch_model(given, changes)
    if dropped:
        keys, before = ", ".join(f"model.{key}" for key in dropped), given["model"].get("name", "hope")
        name = dict(changes)["model.name"]
        log.warning("model.name=%s: dropped keys of the job file that only %s has: %s", name, before, keys)
    for key, value in changes:
        change(given, key, value)
    return given


def _switch_model(given: dict[str, Any], changes: list[tuple[str, Any]]) -> list[str]:
    """If a change is one of model.name, drops the file's model keys that the new model does not have; returns them."""
    section = given.setdefault("model", {})
    if not isinstance(section, dict):
        return []
    before = section.get("name", "hope")
    name = dict(changes).get("model.name", before)
    old, new = ({field.name for field in fields(model_class(each))} for each in (before, name))
    dropped = [key for key in section if key in old - new]
    for key in dropped:
        del section[key]
    return dropped


def change(given: dict[str, Any], key: str, value: Any) -> None:
    """Puts an override's value at a dotted key; a list changes in place only where the file has that element."""
    *parents, last = parts = key.split(".")
    node: Any = given
    for place, part in enumerate(parents):
        if isinstance(node, dict):
            node.setdefault(part, [] if parts[place + 1].isdigit() else {})
        node = node[_index(node, part, key, ".".join(parents[:place]))]
    node[_index(node, last, key, ".".join(parents))] = value


def _index(node: Any, part: str, key: str, where: str) -> str | int:
    """`part` as an index of the dictionary or list that stands at `where`."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"{key}: {where} is a value and has no keys")
    if not part.isdigit() or int(part) >= len(node):
        have = f"{len(node)} elements, counted from 0" if node else "no elements"
        raise ConfigError(f"{key}: no such element, {where} has {have}; give the whole list: {where}=[...]")
    return int(part)


def _check_tracking(config: JobConfig) -> None:
    from nestling.tracking.client import resolve_uri

    resolve_uri(config.tracking.uri, config.run.dir)


def _check_data(config: JobConfig, streamed: bool | None) -> None:
    # numpy, pyarrow and tokenizers are only needed here
    from nestling.data.errors import DataError
    from nestling.data.order import shares
    from nestling.data.preparing import open_tokenizer
    from nestling.data.sources import check_source

    data, sources = config.data, config.stream.sources
    if streamed is None:
        streamed = is_streamed(config)
    if config.training.steps is None and not streamed:
        raise ConfigError("training.steps: got null, which only a stream can have; give a number of steps")
    if sources is not None and not streamed:
        raise ConfigError(
            "stream.sources: only a stream reads them: nestling stream JOB; or stream.sources=null and a data.source"
        )
    try:
        if streamed:
            from nestling.data.streams import open_stream

            if not config.training.checkpoint_every:
                raise ConfigError(
                    "training.checkpoint_every: got 0, but what a stream has not saved it reads again; give the steps "
                    "from one snapshot to the next"
                )
            open_stream(config)
        elif data.mix is None:
            check_source(data.source)
        else:
            shares({str(part.name): part.weight for part in data.mix})
            for number, part in enumerate(data.mix):
                check_source(part.source, f"data.mix.{number}.source")
        vocabulary = open_tokenizer(data).vocab_size
    except DataError as error:
        raise ConfigError(str(error)) from error
    if config.model.vocab_size not in (None, vocabulary):
        raise ConfigError(
            f"model.vocab_size: got {config.model.vocab_size}, the tokenizer has {vocabulary} tokens; "
            "leave model.vocab_size out to take the tokenizer's"
        )
    if streamed:
        try:
            config.stream.check_replay(data.sequence_length, vocabulary)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _say_what_is_unused(given: dict[str, Any], config: JobConfig) -> None:
    training = config.training
    if config.data.mix is not None and "source" in given["data"]:
        log.warning("data.source is not used: data.mix takes its place; data.mix=null would use it")
    if config.stream.sources is not None and "source" in given.get("data", {}):
        log.warning("data.source is not used: stream.sources takes its place; stream.sources=null would use it")
    if training.warmup_steps >= training.last_step:
        log.warning(
            "training.warmup_steps=%d takes up all of training.steps=%d: the learning rate rises until training "
            "ends and does not reach its peak before; lower training.warmup_steps",
            training.warmup_steps,
            training.steps,
        )
    continuum, length = config.continuum, config.data.sequence_length
    if continuum.drive == "schedule" and (continuum.periods or continuum.rates):
        log.warning(
            "continuum.periods and rates are not used: continuum.drive=stream or meta would move levels by them"
        )
    if continuum.drive != "meta" and continuum.second_order:
        log.warning("continuum.second_order is not used: continuum.drive=meta would differentiate the moves")
    if continuum.drive != "schedule" and any(period >= length for period in continuum.periods):
        log.warning(
            "continuum.periods=%s: training and evaluation read %d tokens at a time (data.sequence_length), a level "
            "with a period as long as that never moves in them",
            list(continuum.periods),
            length,
        )
    rules = {training.optimizer, *(level.optimizer for level in config.levels)}
    if training.adamw_learning_rate is not None and rules.isdisjoint(MATRIX_OPTIMIZERS):
        log.warning(
            "training.adamw_learning_rate is not used: no optimizer is %s; training.learning_rate is AdamW's own rate",
            " or ".join(MATRIX_OPTIMIZERS),
        )
    if isinstance(config.model, LevelsConfig):
        widths = config.model.level_widths
        if given["model"].get("level_widths", widths) != widths:
            log.warning("model.level_widths is not used: the widths come from levels: %s", widths)
        return
    unused = ", ".join(str(level.name) for level in config.levels if level.width is not None)
    if unused:
        log.info("%s: has no Continuum Memory System, levels with a width are not used: %s", config.model.name, unused)


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
