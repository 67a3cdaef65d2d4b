"""Presets on a command line: names become files, files of named parts become their content.

    --config quickstart                          -> --config=.../configs/quickstart.yaml
    --model.adapter lora                         -> --model.adapter=.../configs/adapter/lora.yaml
    --model.mitigations.replay replay            -> --model.mitigations.replay={"class_path": ...}
    --model.adapter lora --model.adapter.r 16    -> ... --model.adapter.config.r=16
    --data.domains.a.scorers [nll,mine]          -> --data.domains.a.scorers=["nll", {"class_path": ...}]

jsonargparse reads files for plain arguments but not for entries of a dict; and an argument of PEFT's config lies one
level below the adapter that holds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.presets import CONFIGS, component_kind, find_preset, is_shipped, named_file
from residency.core.yaml_files import YamlRefused, parse_yaml, read_yaml

__all__ = ["CONFIG_OPTIONS", "expand_presets", "insert_presets"]

CONFIG_OPTIONS = ("--config", "-c")

_SUFFIXES = (".yaml", ".yml", ".json")
_LISTS = (
    (re.compile(r"data\.(domains|probes)\.[^=]+\.scorers\+?"), "scorer"),
    (re.compile(r"data\.(domains|probes)\.[^=]+\.augment\+?"), "augmentation"),
)  # keys of lists whose entries may be presets, and their kind
_ENTRIES = ("mitigation", "domain", "inspection")  # kinds whose keys are entries of a dict
_INNER = "config"  # the argument of an adapter that holds a config of PEFT


def expand_presets(words: Sequence[str]) -> list[str]:
    """A command line without names of presets.

    Raises:
        UserError: There is no preset of that name; or a file is missing, is not YAML or holds no component.
    """
    expanded: list[str] = []
    inner: dict[str, set[str]] = {}  # key of a component -> arguments of its inner config
    for word in _joined(words):
        option, equals, value = word.partition("=")
        key = option.lstrip("-")
        if option in CONFIG_OPTIONS and equals and not value.lstrip().startswith("{"):
            path = named_file(value, kinds=CONFIGS, what="the config")
            inner |= _inner_of_config(path)
            expanded.append(f"{option}={path}")
        elif equals and (kind := component_kind(key)) is not None:
            content = _component(key, kind, value)
            inner[key] = _inner_arguments(content)
            is_entry = kind in _ENTRIES or key.startswith("stages.")
            expanded.append(f"{option}={json.dumps(content)}" if content and is_entry else _plain(option, kind, value))
        elif (of := _kind_of_list(key)) and value.startswith("["):
            expanded.append(f"{option}={json.dumps([_entry(one, key, of) for one in _list(value, key)])}")
        else:
            expanded.append(_below(word, inner))
    return expanded


def _plain(option: str, kind: str, value: str) -> str:
    """A plain component as jsonargparse takes it: a file, or what was written."""
    return f"{option}={find_preset(kind, value) or value}"


def insert_presets(config: Any, *, folder: Path, prefix: str = "") -> Any:
    """A config in which every name of a preset, and every file of a named part, is replaced by its content.

    Args:
        config: As read from YAML.
        folder: Of the config; files are relative to it.
        prefix: Key of `config`, for the recursion.
    """
    if isinstance(config, Mapping):
        return {
            name: insert_presets(value, folder=folder, prefix=f"{prefix}.{name}" if prefix else str(name))
            for name, value in config.items()
        }
    if isinstance(config, list) and (of := _kind_of_list(prefix)):
        return [_entry(one, prefix, of, folder) for one in config]
    kind = component_kind(prefix)
    if not isinstance(config, str) or kind is None:
        return config
    found = find_preset(kind, config)
    if found is None and kind in _ENTRIES and config.endswith(_SUFFIXES):
        found = folder / config
    return config if found is None else _checked(found, prefix, config)


def _list(text: str, key: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlRefused as error:
        raise UserError(f"--{key}={text}", why=f"it is no list: {error}", fix="write it as [a, b]") from error


def _kind_of_list(key: str) -> str | None:
    return next((kind for pattern, kind in _LISTS if pattern.fullmatch(key)), None)


def _entry(given: Any, key: str, kind: str, folder: Path = Path()) -> Any:
    """One entry of a list: the content of a preset or of a file, anything else as it is."""
    if not isinstance(given, str):
        return given
    found = folder / given if given.endswith(_SUFFIXES) else find_preset(kind, given)
    if found is None or (kind == "scorer" and is_shipped(found) and _is_short_name(given)):
        return given
    return _checked(found, key, given, kind=kind)


def _is_short_name(name: str) -> bool:
    from residency.scorers.find import known_names

    return name in known_names()


def _joined(words: Sequence[str]) -> list[str]:
    """`--key value` of a component or a config as `--key=value`."""
    joined: list[str] = []
    for word in words:
        waiting = joined[-1] if joined else ""
        takes = waiting in CONFIG_OPTIONS or (waiting.startswith("--") and "=" not in waiting)
        if takes and not word.startswith("-") and (waiting in CONFIG_OPTIONS or _about_component(waiting)):
            joined[-1] = f"{waiting}={word}"
        else:
            joined.append(word)
    return joined


def _about_component(option: str) -> bool:
    """Whether an option chooses a component, or is an argument of the adapter."""
    key = option.lstrip("-")
    return component_kind(key) is not None or (key.startswith("model.adapter.") and not key.endswith(".help"))


def _component(key: str, kind: str, value: str) -> Mapping[str, Any] | None:
    """What a preset or a file holds; `None` where a class or anything else is given."""
    found = find_preset(kind, value)
    if found is None and value.endswith(_SUFFIXES):
        found = Path(value)
        if kind not in _ENTRIES and not found.is_file():
            return None  # refused where all plain arguments are
    return None if found is None else _checked(found, key, f"--{key}={value}")


def _checked(path: Path, key: str, written: str, *, kind: str | None = None) -> Mapping[str, Any]:
    content = read_yaml(path, what=key)
    if not (isinstance(content, dict) and "class_path" in content):
        raise UserError(
            f"{written}: the file has no class_path",
            why="a preset is one component: class_path and init_args",
            fix=f"start from a preset (`residency presets {kind or component_kind(key)}`)",
        )
    # A preset of a domain may name presets of scorers and augmentations.
    inserted: Mapping[str, Any] = insert_presets(content, folder=path.parent, prefix=key)
    return inserted


def _inner_of_config(path: Path) -> dict[str, set[str]]:
    """{key: arguments of the inner config} of the adapter of a config file."""
    content = read_yaml(path, what="the config")
    adapter = _part(_part(content, "model"), "adapter")
    if isinstance(adapter, str):
        named = find_preset("adapter", adapter) or path.parent / adapter
        adapter = read_yaml(named, what="model.adapter") if named.is_file() else None
    return {"model.adapter": _inner_arguments(adapter)} if isinstance(adapter, Mapping) else {}


def _inner_arguments(component: Any) -> set[str]:
    arguments = _part(component, "init_args")
    inner = _part(_part(arguments, _INNER), "init_args")
    return {name for name in inner if name not in arguments} if isinstance(inner, Mapping) else set()


def _part(content: Any, key: str) -> Any:
    """A value of a mapping; `None` where what a file holds is none: the parser says so."""
    return content.get(key) if isinstance(content, Mapping) else None


def _below(word: str, inner: Mapping[str, set[str]]) -> str:
    """`--model.adapter.r=16` with its place inside the adapter's config."""
    for key, arguments in inner.items():
        start = f"--{key}."
        if word.startswith(start) and word.removeprefix(start).partition("=")[0].partition(".")[0] in arguments:
            return f"{start}{_INNER}.{word.removeprefix(start)}"
    return word
