"""Three rules of jsonargparse are replaced, because there are no options for them.

*A component whose class is switched starts from the new class's own defaults.* jsonargparse keeps init_args of the old
class that the new one happens to accept too: a config with `EWC(strength: 7)` and `--model.mitigations.ewc=MAS` on the
command line would silently give `MAS(strength: 7)`, which corrupts an ablation (spec/pitfalls, J1).

*A value of a key without a type is plain data.* jsonargparse builds an object of whatever `class_path` it finds in one:
`axes: {x: {class_path: subprocess.run, init_args: ...}}` would run a program. And what a typed key imports is compared
with `runs.config.imports`.

*YAML has limits* (`core.yaml_files`), wherever jsonargparse reads it: in files and in single words.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from jsonargparse import Namespace, _actions, _loaders_dumpers, _typehints

from residency.core.yaml_files import MAX_DEPTH, check_yaml
from residency.runs.config import jsonargparse_speed
from residency.runs.config.imports import check_path, import_named, note

__all__ = ["install"]


def install() -> None:
    """Replace jsonargparse's rules (idempotent).

    Raises:
        RuntimeError: This version of jsonargparse has no such rule; silently going on would corrupt ablations, or run
            what a config says.
    """
    for rule in ("discard_init_args_on_class_path_change", "adapt_classes_any", "import_object"):
        if not hasattr(_typehints, rule):
            raise RuntimeError(f"jsonargparse moved its rule {rule}: residency needs a version that was tested")
    _typehints.discard_init_args_on_class_path_change = _forget_all
    _typehints.adapt_classes_any = _plain
    if not isinstance(_typehints.import_object, partial):
        _typehints.import_object = partial(_import_object, _typehints.import_object)
        _actions.import_object = _typehints.import_object
        _loaders_dumpers.yaml_load = partial(_load_yaml, _loaders_dumpers.yaml_load)
        _loaders_dumpers.loaders["yaml"] = _loaders_dumpers.yaml_load
        jsonargparse_speed.install()


def _plain(val: Any, *args: Any, **kwargs: Any) -> Any:
    """What jsonargparse makes of a value without a type: the value."""
    return val


def _import_object(original: Any, name: str, check_path_too: bool = True) -> Any:
    """jsonargparse's import of a class or a function that a value names; what annotations name is not checked."""
    if not check_path_too:
        return original(name, False)
    check_path(str(name))
    # Its own list of refused modules only warns by default; `note` refuses what a path leads to.
    found = original(name, False)
    note(str(name), found)
    return found


def _load_yaml(original: Any, stream: str) -> Any:
    # Most values are short words, and there are thousands of them.
    if len(stream) > MAX_DEPTH or any(sign in stream for sign in "&\\\0"):
        check_yaml(stream)
    return original(stream)


def _forget_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    if prev_val and _class(prev_val["class_path"]) is not _class(value["class_path"]):
        for key in {"init_args", "dict_kwargs"} & {*vars(prev_val)}:
            prev_val[key] = Namespace()


def _class(path: Any) -> Any:
    """What a path means: one class may be reached by several."""
    module, _, name = str(path).rpartition(".")
    return getattr(import_named(module), name, path)
