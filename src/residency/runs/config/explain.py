"""What is wrong with a config, in the words of its user: jsonargparse speaks of its own types and unions."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from residency.core.errors import UserError
from residency.runs.config.imports import import_named
from residency.runs.config.sources import ConfigEntry, written

__all__ = ["UNION", "ParseFailure", "explain"]

UNION = "Does not validate against any of the Union subtypes"
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}
_SHOWN = 12  # names in a message


class ParseFailure(Exception):
    """jsonargparse refused a config; raised by the parser, told by `explain`.

    Args:
        message: Its message; its exceptions are the causes of this one.
        accepted: Keys that the parser knows.
    """

    def __init__(self, message: str, *, accepted: Sequence[str]) -> None:
        super().__init__(message)
        self.accepted = list(accepted)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is known about a refusal.

    Args:
        texts: Messages, the most specific one first.
        accepted: Keys where the most specific one arose.
        given: What the user has written, what counts most first.
        verb: Of the command line.
        classes: Names of classes, by the start of the keys that take them.
    """

    texts: Sequence[str]
    accepted: Sequence[str]
    given: Sequence[ConfigEntry]
    verb: str
    classes: Mapping[str, Sequence[str]]

    def at(self, key: str, value: str | None = None) -> str:
        """A key (or the end of one) as the user wrote it."""
        fits = [w for w in self.given if w.key == key or w.key.endswith(f".{key}")]
        exact = [w for w in fits if value is None or str(w.value) == value]
        return next(map(str, exact + fits), key if value is None else f"{key}: {value}")

    def key(self) -> str:
        """The key that the most specific message is about; its start may be missing."""
        named = [m[1] for text in self.texts if (m := re.search(r'Parser key "([^"]+)"', text))]
        # What was tried for one entry of a dict is told under the dict's own key.
        entry = next((m[1] for text in self.texts if (m := re.search(r"NestedArg\(key='([^']+)'", text))), None)
        return f"{named[-1]}.{entry}" if named and entry else named[0] if named else ""


def explain(refusal: ParseFailure, words: Sequence[str], classes: Mapping[str, Sequence[str]]) -> UserError:
    """The one message for the user.

    Args:
        refusal: From the parser.
        words: The command line, the verb first.
        classes: Names of classes, by the start of the keys that take them.
    """
    chain = list(_causes(refusal))[::-1]
    own = next((error for error in chain if isinstance(error, UserError)), None)
    if own is not None:
        return own
    case = _Case(
        texts=[str(error) for error in chain],
        accepted=next((error.accepted for error in chain if hasattr(error, "accepted")), []),
        given=written(words[1:]),
        verb=words[0],
        classes=classes,
    )
    for place, text in enumerate(case.texts):
        for pattern, answer in _ANSWERS:
            if match := re.search(pattern, text, re.DOTALL):
                return answer(case, match, place)
    return UserError(
        " ".join(str(refusal).split()),
        why="the config or the command line has a key or a value that does not fit",
        fix=f"`residency {case.verb} --help` lists the keys, `--print_config` shows a complete config",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _nearest(word: str, names: Sequence[str], *, cutoff: float = 0.6) -> str | None:
    """The name that was probably meant; upper and lower case count least."""
    # Of a class and a preset of one name, the one that is spelt as the word is: EWC, ewc.
    known = {name.lower(): name for name in sorted(names, key=lambda name: name.islower() == word.islower())}
    found = get_close_matches(word.lower(), known, 1, cutoff)
    return known[found[0]] if found else None


# -- answers: (case, match, place of the matching text) -> message ----------------------------------------------


def _unknown_key(case: _Case, match: re.Match[str], place: int) -> UserError:
    key = match["key"].lstrip("-").partition("=")[0]
    near = _nearest(key, case.accepted)
    few = f" here, only {', '.join(case.accepted) or 'a class without arguments'}"
    return UserError(
        case.at(key),
        why=f"there is no key {key!r}" + (few if len(case.accepted) <= _SHOWN else ""),
        fix=f"did you mean {near!r}?" if near else f"`residency {case.verb} --help` lists the keys",
    )


def _stray_word(case: _Case, match: re.Match[str], place: int) -> UserError:
    return UserError(
        f"residency {case.verb} ... {match['word']}",
        why="the word belongs to no option",
        fix="write options as --key=value, and texts with blanks in quotes",
    )


def _missing(case: _Case, match: re.Match[str], place: int) -> UserError:
    names = [name.strip().removeprefix(f"{case.verb}.") for name in match["names"].split(",")]
    owner = next((m[1] for text in case.texts if (m := re.search(r"given class_path '([^']+)'", text))), "")
    short = owner.rpartition(".")[2]
    homes = [w.key.removesuffix(".class_path") for w in case.given if str(w.value) in (owner, short)]
    full = {w.key for w in case.given}
    lacking = (h for h in homes if not {f"{h}.{names[0]}", f"{h}.init_args.{names[0]}"} & full)
    example = "configs/studies/quickstart.yaml" if case.verb == "sweep" else "configs/quickstart.yaml"
    place_of = next((f"{home} ({short})" for home in lacking), short)
    return UserError(
        f"{place_of} has no {', '.join(names)}" if short else f"missing: {', '.join(names)}",
        why="there is no default for it",
        fix=f"give it in the file or as an option; {example} is complete and a good start",
    )


def _wrong_value(case: _Case, match: re.Match[str], place: int) -> UserError:
    above = case.texts[place + 1] if place + 1 < len(case.texts) else ""
    subtypes = re.search(r"Subtypes: \[(.*)\]$", above, re.MULTILINE) if above.startswith(UNION) else None
    types = _split(subtypes[1]) if subtypes else [match["type"]]
    value = match["value"] or next((m[1] for t in case.texts if (m := re.search(r"Given value: ([^\n]*)$", t))), None)
    wanted = list(dict.fromkeys(name for kind in types for name in _described(kind)))
    near = _nearest(str(value), wanted)
    return UserError(
        case.at(case.key(), value),
        why=f"the value must be {', '.join(wanted[:-1])}{' or ' if wanted[1:] else ''}{wanted[-1]}",
        fix=f"did you mean {near!r}?" if near else f"correct it; `residency {case.verb} --help` describes every key",
    )


def _split(types: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [part.strip() for part in re.split(r",\s*(?![^\[]*\])", types)]


def _described(kind: str) -> list[str]:
    """A type in words; each choice of a `Literal`."""
    if choices := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return [str(choice) for choice in ast.literal_eval(f"({choices[1]},)")]
    name = re.sub(r"^<class '(.*)'>$", r"\1", kind)
    if re.match(r"dict|collections\.abc\.Mapping", name):
        return ["a mapping (key: value)"]
    if re.match(r"list|typing\.List", name):
        return ["a list, such as [a, b]"]
    return [_TYPES.get(name, re.sub(r"\b(?:\w+\.)+", "", name))]


def _wrong_class(case: _Case, match: re.Match[str], place: int) -> UserError:
    name, reason = match["name"].strip("'"), match.groupdict().get("reason")
    entry = next((w for w in case.given if str(w.value) == name), None)
    key = entry.key if entry else case.key()
    got = str(entry) if entry else case.at(key, name)
    if name.endswith((".yaml", ".yml", ".json")):
        return UserError(
            got,
            why=f"there is no file {name}",
            fix="paths on the command line are relative to the folder you start from, paths in a config to its folder",
        )
    names = next((names for start, names in case.classes.items() if key.startswith(start)), ())
    near = None if name in (beside := _siblings(name)) else _nearest(name, [*names, *beside], cutoff=0.75)
    return UserError(
        got,
        why=" ".join(reason.split()) if reason else f"there is no class {name} for this key",
        fix=f"did you mean {near!r}?"
        if near
        else f"give {', '.join([*names, ''])}a full path (package.module.Class) or a preset file",
    )


def _siblings(name: str) -> set[str]:
    """Full paths of the classes beside a name."""
    package = name.rpartition(".")[0]
    module = import_named(package)
    found = vars(module) if module is not None else {}
    return {f"{package}.{other}" for other, value in found.items() if isinstance(value, type)}


def _ambiguous(case: _Case, match: re.Match[str], place: int) -> UserError:
    return UserError(
        case.at(case.key(), match["name"]),
        why=f"several classes have the name {match['name']}: {match['paths']}",
        fix="give the full path of one of them",
    )


_Answer = Callable[[_Case, "re.Match[str]", int], UserError]
_ANSWERS: tuple[tuple[str, _Answer], ...] = (
    (r"^unrecognized arguments: (?P<key>-\S+)", _unknown_key),
    (r"^unrecognized arguments: (?P<word>.*)", _stray_word),
    (r"(?:^['\"]?Option|does not accept option) '(?P<key>[^']+)'", _unknown_key),
    (r"the following arguments are required: (?P<names>[^\n]+)", _missing),
    (r"Multiple subclasses with name (?P<name>\S+)\. Give [^:]*: (?P<paths>.*)\.", _ambiguous),
    (r"given class_path (?P<name>'[^']+'):\n\s*(?P<reason>(?:module|No module|cannot import) .*)", _wrong_class),
    (r"(?:Expected a dot import path string|Unexpected import path format): (?P<name>\S+)", _wrong_class),
    (r"(?P<reason>Import path (?P<name>\S+) does not correspond .*)", _wrong_class),
    (r"(?P<reason>Expected an instantiatable class, but (?P<name>\S+) .*)", _wrong_class),
    (r"callable class: (?P<reason>.*)\. Got value: Namespace\(class_path=(?P<name>'[^']+')", _wrong_class),
    (r"^Expected (?:an? )?(?P<type>[^\n]+?)(?:\. Got value: (?P<value>[^\n]*))?$", _wrong_value),
)
