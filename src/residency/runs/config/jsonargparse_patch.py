"""A component whose class is switched starts from the new class's own defaults.

jsonargparse keeps init_args of the old class that the new one happens to accept too: a config with `EWC(strength: 7)`
and `--model.mitigations.ewc=MAS` on the command line would silently give `MAS(strength: 7)`, which corrupts an ablation
(spec/pitfalls, J1). There is no option for it, so the one function that both merging paths call is replaced.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jsonargparse import Namespace, _typehints

__all__ = ["install"]


def install() -> None:
    """Replace jsonargparse's merging rule (idempotent).

    Raises:
        RuntimeError: This version of jsonargparse has no such rule; silently going on would corrupt ablations.
    """
    if not hasattr(_typehints, "discard_init_args_on_class_path_change"):
        raise RuntimeError("jsonargparse moved its merging rule: residency needs jsonargparse >=4.46,<5 as tested")
    _typehints.discard_init_args_on_class_path_change = _forget_all


def _forget_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    if prev_val and _class(prev_val["class_path"]) is not _class(value["class_path"]):
        for key in {"init_args", "dict_kwargs"} & {*vars(prev_val)}:
            prev_val[key] = Namespace()


def _class(path: Any) -> Any:
    """What a path means: one class may be reached by several."""
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return path
