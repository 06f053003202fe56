"""Loading a configuration: the schema's defaults, under a YAML file, under `key=value` overrides.

Every wrong key, type, value or missing file is one line that names the field, the value and the way out, and
all of them are told together. Importing this module imports neither torch nor Ray, which take seconds.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlpipe.paths import resolve_path
from rlpipe.schema import (
    Config,
    CreditSection,
    DataSection,
    EvaluateSection,
    GenerateSection,
    LearnerSection,
    LossSection,
    ObserveSection,
    PlacementSection,
    PolicySection,
    ReferenceSection,
    RolloutSection,
    RunSection,
    ScorerSection,
    SftSection,
    TrainSection,
)
from rlpipe.validation import problems_of

__all__ = [
    "Config",
    "ConfigError",
    "CreditSection",
    "DataSection",
    "EvaluateSection",
    "GenerateSection",
    "LearnerSection",
    "LossSection",
    "ObserveSection",
    "PlacementSection",
    "PolicySection",
    "ReferenceSection",
    "RolloutSection",
    "RunSection",
    "ScorerSection",
    "SftSection",
    "TrainSection",
    "load_config",
    "parse_args",
    "resolve_path",
    "to_yaml",
    "validate",
]

DEFAULT_CONFIG = "configs/tiny_grpo.yaml"

_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list[str]": "a list of texts, e.g. [a, b]",
    "list[float]": "a list of numbers, e.g. [0.9, 0.95]",
    "dict[str, Any]": "a mapping, e.g. {key: value}",
}


class ConfigError(ValueError):
    """A configuration that cannot be run; one line a problem: the field, the value, the way out."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (none: configs/tiny_grpo.yaml) and merge overrides such as `train.steps=3` over it.

    `reward` is a list; an entry's missing keys have the schema's defaults, and `reward.0.weight=2` or
    `reward[0].weight=2` changes one of them (the index after the last adds an entry). Raises ConfigError with
    every wrong key and type. Ranges and files are checked by `validate`.

        config = load_config("configs/tiny_grpo.yaml", ["train.steps=3", "reward.0.weight=2"])
    """
    problems: list[str] = []
    tree = asdict(Config())
    _merge(tree, _read(resolve_path(path or DEFAULT_CONFIG)), (), problems)
    for override in overrides:
        _override(tree, override, problems)
    config = _typed(tree, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def validate(config: Config, job: str = "grpo") -> Config:
    """Check ranges, choices, rules across fields and files; all problems in one ConfigError, one line each.

    job: "grpo" needs training prompts and scorers, "sft" does without, "generate" neither trains nor measures.
    Prompt files are read, so that a bad row is named before anything starts.
    """
    problems = problems_of(config, job)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def parse_args(
    description: str,
    default_config: str = DEFAULT_CONFIG,
    argv: Sequence[str] | None = None,
    job: str = "grpo",
) -> tuple[Config, bool]:
    """The command line of a launch script: `[--config FILE] [--dry-run] key=value ...`.

    Returns the checked configuration and whether it is a dry run, whose resolved YAML has then been printed:
    the script returns at once. A configuration that cannot be run is told on stderr, exit status 2.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=default_config, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=3")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = validate(load_config(arguments.config, arguments.overrides), job)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.dry_run:
        print(to_yaml(config), end="")
    return config, arguments.dry_run


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config: no file {path}; give a YAML file such as {DEFAULT_CONFIG}")
    try:
        loaded = OmegaConf.load(path)
        tree = OmegaConf.to_container(loaded, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} holds a {type(tree).__name__}; give sections such as `train:`")
    return tree


def _merge(base: dict[str, Any], new: Mapping[Any, Any], where: tuple, problems: list[str]) -> None:
    """Merge a mapping over a tree of defaults in place; a list replaces a list."""
    for key, value in new.items():
        name = (*where, key)
        if key not in base:
            problems.append(_unknown(name, base))
        elif name == ("reward",):
            base[key] = _scorers(value, problems)
        elif _type_of(name).startswith("dict") and isinstance(value, Mapping):
            base[key] = _overlaid(base[key], value)
        elif not isinstance(base[key], dict) or _type_of(name):
            base[key] = value
        elif isinstance(value, Mapping):
            _merge(base[key], value, name, problems)
        elif value is not None:  # A section whose lines are all commented out reads as null.
            first = next(iter(base[key]))
            problems.append(f"{_dotted(name)}: {value!r} is no section; give keys such as {_dotted(name)}.{first}")


def _overlaid(base: Any, new: Any) -> Any:
    """`new` over `base`, mappings key by key; any key is allowed."""
    if not (isinstance(base, Mapping) and isinstance(new, Mapping)):
        return new
    return {**base, **{key: _overlaid(base.get(key), value) for key, value in new.items()}}


def _scorers(value: Any, problems: list[str]) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        problems.append(f"reward: {value!r} is no list; give one entry a scorer, e.g. `- name: judge`")
        return []
    entries = []
    for i, entry in enumerate(value):
        entries.append(asdict(ScorerSection()))
        if isinstance(entry, Mapping):
            _merge(entries[-1], entry, ("reward", i), problems)
        else:
            problems.append(f"reward.{i}: {entry!r} is no mapping; give keys such as `name: judge`")
    return entries


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Merge one `a.b=value` over the tree."""
    key, equals, text = override.partition("=")
    name = tuple(int(part) if part.isdigit() else part for part in re.split(r"[.\[\]]+", key.strip()) if part)
    if not equals or not name:
        problems.append(f"override: {override!r} has no value; write key=value, e.g. train.steps=3")
        return
    try:
        value = _parse(text, _type_of(name))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{_dotted(name)}: {text!r} is not YAML: {_one_line(error)}")
        return
    base, where, rest = tree, (), name
    if name[0] == "reward" and len(name) > 1:
        entries = tree["reward"]
        if name[1] not in range(len(entries) + 1):
            problems.append(f"{_dotted(name)}: no scorer {name[1]}; there are {len(entries)}, counted from 0")
            return
        if name[1] == len(entries):
            entries.append(asdict(ScorerSection()))
        base, where, rest = entries[name[1]], name[:2], name[2:]
        if rest == ("options",) and isinstance(value, Mapping):
            base["options"] = {}  # Given as a whole they replace, for another scorer takes other ones.
    for part in reversed(rest):
        value = {part: value}
    if isinstance(value, Mapping):
        _merge(base, value, where, problems)
    else:
        problems.append(f"{_dotted(name)}: {text!r} is no section; give a key, e.g. {_dotted(name)}.weight=2")


def _parse(text: str, declared: str) -> Any:
    """The value of an override; text fields are taken as they stand, except `null` where it is allowed."""
    if declared.startswith("str") and not (text == "null" and "None" in declared):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]


def _typed(tree: dict[str, Any], problems: list[str]) -> Config:
    """Turn the merged tree into a Config through OmegaConf's typed nodes; adds a line for each wrong type."""
    typed = OmegaConf.structured(Config)
    typed.reward = [ScorerSection() for _ in tree["reward"]]
    for name, value in _leaves(tree):
        key = _dotted(name)
        try:
            OmegaConf.update(typed, key, value)
            OmegaConf.select(typed, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            declared = _type_of(name)
            if isinstance(value, str) and ("${" in value or value == "???"):
                problems.append(f"{key}: {value!r} does not resolve: {str(error).splitlines()[0]}")
            else:
                problems.append(f"{key}: {value!r} does not fit; give {_noun(declared)}")
    return Config() if problems else OmegaConf.to_object(typed)


def _leaves(tree: Mapping[str, Any], where: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in tree.items():
        name = (*where, key)
        if name == ("reward",):
            for i, entry in enumerate(value):
                yield from _leaves(entry, (*name, i))
        elif isinstance(value, dict) and _type_of(name) == "":
            yield from _leaves(value, name)
        else:
            yield name, value


def _declared_types(section: Any, where: str = "") -> dict[str, str]:
    """Dotted key -> annotation, for every key below a section; `reward.*` stands for the scorers."""
    types: dict[str, str] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if f.name == "reward":
            types |= _declared_types(ScorerSection(), "reward.*.")
        elif is_dataclass(value):
            types |= _declared_types(value, f"{where}{f.name}.")
        else:
            types[f"{where}{f.name}"] = str(f.type)
    return types


_TYPES = _declared_types(Config())


def _type_of(name: tuple) -> str:
    """The annotation of a key, "" for a section or anything below a key."""
    return _TYPES.get(".".join("*" if isinstance(part, int) else str(part) for part in name), "")


def _noun(declared: str) -> str:
    optional = declared.endswith(" | None")
    return _NOUNS[declared.removesuffix(" | None")] + (" or null" if optional else "")


def _dotted(name: tuple) -> str:
    return ".".join(map(str, name))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unknown(name: tuple, siblings: Mapping[str, Any]) -> str:
    """One line for a key that does not exist, with the nearest one that does."""
    key, parent = _dotted(name), _dotted(name[:-1])
    here = [f"{parent}.{k}" if parent else str(k) for k in siblings]
    elsewhere = [known.replace("*", "0") for known in _TYPES if known.rpartition(".")[2] == str(name[-1])]
    near = difflib.get_close_matches(key, here, 1, 0.75) or elsewhere
    near = near or difflib.get_close_matches(key, here, 1)
    way_out = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(map(str, siblings))}"
    return f"{key}: no such key; {way_out}"
