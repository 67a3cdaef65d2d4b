"""Fine-tune a language model on one domain after another, and see what it forgets."""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from residency.core.errors import UserError
    from residency.core.presets import list_presets
    from residency.report.gate_command import gate
    from residency.runs.api import (
        Run,
        chat,
        compare,
        export,
        fit,
        list_runs,
        load_run,
        merge,
        predict,
        push,
        remove_run,
        score,
    )
    from residency.runs.compare_command import compare_stages
    from residency.study.api import StudyRuns, init, load_study, sweep

__all__ = [
    "Run",
    "StudyRuns",
    "UserError",
    "chat",
    "compare",
    "compare_stages",
    "export",
    "fit",
    "gate",
    "init",
    "list_presets",
    "list_runs",
    "load_run",
    "load_study",
    "merge",
    "predict",
    "push",
    "remove_run",
    "score",
    "sweep",
]

_HOMES = {
    "UserError": "core.errors",
    "list_presets": "core.presets",
    "gate": "report.gate_command",
    "compare_stages": "runs.compare_command",
    **dict.fromkeys(("StudyRuns", "init", "load_study", "sweep"), "study.api"),
}
"""Where a name of the API lives, if not in runs.api."""

# On import bitsandbytes looks for an optional kernel package and reports that it is not there; nothing here uses it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Tokenizers are used before and after data-loader processes fork; their own threads would only warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for each other by spinning slow every process down tenfold once a machine runs more threads than it
# has cores (two runs side by side, a run beside a notebook). Read when torch is imported; a user's own choice wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Tensors of 2 MB and more in huge pages, where Linux gives them to whoever asks: a step reads hundreds of megabytes of
# weights, and takes some 4 % less processor time. Read at the first allocation; a user's own choice wins.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `residency --help` and the names above must not cost the import of torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"residency.{_HOMES.get(name, 'runs.api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
