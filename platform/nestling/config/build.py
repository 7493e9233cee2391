"""From a plain mapping to a checked `JobConfig`, with errors that name the full key.

OmegaConf's structured configs convert and check every value; they are filled one value at a time because a merge of
whole trees loses the path of what is wrong inside a list.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from nestling.config.data import MixConfig
from nestling.config.schema import JobConfig, LevelConfig
from nestling.config.stream import StreamSourceConfig
from nestling.models.config import MODEL_CONFIGS, SkeletonConfig

Section = TypeVar("Section")

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "list[str]": "a list of texts",
    "dict[str, Any]": "a mapping",
    "tuple[float, float]": "two numbers, such as [0.9, 0.98]",
}
#: Lists of sections, as a person would write them.
_EXAMPLES: dict[Any, str] = {
    LevelConfig: "[{period: 1, width: 64}]",
    MixConfig: "[{source: embedded:english, weight: 2}, {source: embedded:python}]",
    StreamSourceConfig: "[{source: texts}, {source: chat, levels: [level1]}]",
}


class ConfigError(ValueError):
    """Something is wrong with a job file or an override; the message is complete and ready to print."""


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for `key`, naming the nearest of the `known` keys (full dotted paths)."""
    if key.startswith("optimizers.adamw"):
        return ConfigError(
            f"{key}: unknown key; AdamW's settings are training.betas and training.learning_rate "
            "(levels.N.learning_rate in a level)"
        )
    known = list(known)
    section = key.rpartition(".")[0]
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.0
    )
    return ConfigError(f"{key}: unknown key; the nearest known one is {nearest[0]}")


def model_class(name: object) -> type[SkeletonConfig]:
    """The configuration class of the model called `name`; ConfigError if there is none."""
    if not isinstance(name, str) or name not in MODEL_CONFIGS:
        raise ConfigError(f"model.name: got {name!r}, needs one of {', '.join(MODEL_CONFIGS)}")
    return MODEL_CONFIGS[name]


def holds_text(key: str) -> bool:
    """Whether the field at a dotted key (`levels.0.name`) is a text, or a text or null, in any model."""
    classes: list[Any] = [JobConfig]
    hints: list[Any] = []
    for part in key.split("."):
        if not part.isdigit():
            hints = [found[part] for found in map(get_type_hints, classes) if part in found]
            classes = [each for hint in hints for each in _inside(hint) if is_dataclass(each)]
            classes += MODEL_CONFIGS.values() if SkeletonConfig in classes else ()
    return any(hint in (str, str | None) for hint in hints)


def build(given: Mapping[str, Any]) -> JobConfig:
    """Fills a job with what is given; raises ConfigError for unknown keys, wrong types and values that cannot work."""
    model = given.get("model")
    name = model.get("name", "hope") if isinstance(model, dict) else "hope"
    job = OmegaConf.structured(JobConfig)
    job.model = OmegaConf.structured(model_class(name))
    _fill(job, job, given, "")
    config: JobConfig = _made(job)
    return config


def build_section(kind: type[Section], given: Mapping[str, Any]) -> Section:
    """The same for a configuration that is not a job's: a dataclass whose lists and mappings are typed."""
    section = OmegaConf.structured(kind)
    _fill(section, section, given, "")
    made: Section = _made(section)
    return made


def _made(section: DictConfig) -> Any:
    """The dataclasses that a filled section stands for."""
    try:
        return OmegaConf.to_object(section)
    except MissingMandatoryValue as error:
        key = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "")
        raise ConfigError(f"{key}: is missing, and has no default; give a value") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fill(job: DictConfig, section: DictConfig, given: Any, path: str) -> None:
    """Copies `given` into a section of the job, key by key; `path` is where the section stands ("" at the top)."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: got {given!r}, needs a mapping with keys such as {', '.join(list(section)[:3])}")
    section_class: Any = OmegaConf.get_type(section)
    annotations = {field.name: str(field.type) for field in fields(section_class)}
    hints = get_type_hints(section_class)
    for key, value in given.items():
        full_key = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise unknown_key(_first_leaf(full_key, value), [*_keys(job, ""), *_keys(section, path)])
        element = next(filter(is_dataclass, _inside(hints[key])[1:]), None)
        if is_dataclass(hints[key]):
            _fill(job, section[key], value, full_key)
        elif element is not None and not (value is None and type(None) in get_args(hints[key])):
            if not isinstance(value, list):
                raise ConfigError(f"{full_key}: got {value!r}, needs a list, for example {_example(element)}")
            section[key] = [OmegaConf.structured(element) for _ in value]
            for place, item in enumerate(value):
                _fill(job, section[key][place], item, f"{full_key}.{place}")
        else:
            try:
                OmegaConf.update(section, key, value, merge=False)
            except (OmegaConfBaseException, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{full_key}: got {value!r}, needs {_in_words(hints[key], annotations[key])}"
                ) from error


def _example(element: Any) -> str:
    return _EXAMPLES.get(element) or f"[{{{fields(element)[0].name}: ...}}]"


def _inside(hint: Any) -> list[Any]:
    """A type and everything it is made of: `list[X] | None` holds `list[X]`, X and None."""
    return [hint, *(each for argument in get_args(hint) for each in _inside(argument))]


def _first_leaf(path: str, value: Any) -> str:
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        path = f"{path}.{key}"
    return path


def _in_words(hint: Any, annotation: str) -> str:
    """A type, and how it is written, as a person would say it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    return " or ".join(_WORDS.get(part, part) for part in annotation.split(" | "))


def _keys(section: DictConfig, path: str) -> list[str]:
    """Full dotted paths of every key below a section."""
    keys = []
    for key in section:
        full_key = f"{path}.{key!s}" if path else str(key)
        keys.append(full_key)
        if isinstance(section[key], DictConfig):
            keys += _keys(section[key], full_key)
    return keys
