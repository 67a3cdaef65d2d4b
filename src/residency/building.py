"""Building objects from a config: quietly, and with the errors of the classes themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from residency.errors import UserError
from residency.mistakes import UNION

__all__ = ["building"]


@contextmanager
def building() -> Iterator[None]:
    """Around jsonargparse's instantiation: what a class says itself counts, not what jsonargparse makes of it.

    Raises:
        UserError: As the class raised it, or from the `ValueError` of a class that is not ours.
    """
    try:
        with warnings.catch_warnings():
            # LoraConfig warns about its own default once jsonargparse spells it out.
            warnings.filterwarnings("ignore", message=".*loftq_config.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    except Exception as error:
        root: BaseException = error
        while str(root).startswith(UNION) and root.__cause__ is not None:
            root = root.__cause__
        if not isinstance(root, ValueError):
            raise root from root.__cause__
        raise UserError(
            f"{_constructed(root)}: {' '.join(str(root).split())}",
            why="the class refuses the values that the config gives it",
            fix="correct them; `--print_config` shows what it is given",
        ) from root


def _constructed(error: BaseException) -> str:
    """The class in whose constructor an error arose."""
    trace, name = error.__traceback__, "the config"
    while trace is not None:
        code, local = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code.co_name in ("__init__", "__post_init__") and "self" in local:
            name = type(local["self"]).__name__
        trace = trace.tb_next
    return name
