"""What a run reads from files that its config only names, by content: a run that goes on must read the same."""

from __future__ import annotations

from collections.abc import Mapping

from residency.core.errors import UserError
from residency.core.tensor_files import read_json, write_json
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.runs.folder import RunFolder

__all__ = ["check_complete", "compare_inputs", "inputs_of", "keep_inputs"]

_FILE = "inputs.json"


def inputs_of(module: ContinualModule, data: StreamData) -> dict[str, str]:
    """{what, as a message names it: its hash}.

    Args:
        module: Not yet built; its backbone tells what lies in the model's folder.
        data: Domains and probes.
    """
    found = module.backbone.for_stream(data).fingerprint()
    model = {f"{part} of the model": value for part, value in found.items()}
    return model | {f"rows or template of {name}": value for name, value in data.fingerprints().items()}


def keep_inputs(folder: RunFolder, inputs: Mapping[str, str]) -> None:
    """Write the hashes into the run's folder, or compare with those that are there once a stage is.

    Args:
        folder: Of the run; locked.
        inputs: From `inputs_of`.

    Raises:
        UserError: Files have changed since the run began; they are named.
    """
    path = folder.path / _FILE
    if not (path.is_file() and folder.begun()):
        write_json(path, dict(inputs))
        return
    compare_inputs(folder, inputs)


def compare_inputs(folder: RunFolder, inputs: Mapping[str, str], *, instead: str = "--run_dir (or --name)") -> None:
    """Compare hashes with those that a run was begun with; a run of an earlier version has none.

    Args:
        folder: Of the run.
        inputs: From `inputs_of`.
        instead: Which option chooses another place.

    Raises:
        UserError: Files have changed since the run began; they are named.
    """
    path = folder.path / _FILE
    old = read_json(path) if path.is_file() else dict(inputs)
    changed = sorted(name for name in {*old, *inputs} if old.get(name) != inputs.get(name))
    if changed:
        raise UserError(
            f"{folder.path} was begun with other files; changed since: {', '.join(changed[:6])}",
            why="one score matrix would be made of two test sets, or of two models",
            fix=f"bring the old files back, or choose another {instead}",
        )


def check_complete(folder: RunFolder, module: ContinualModule, data: StreamData) -> None:
    """Compare the files that a complete run was made from, as far as they are still there.

    Raises:
        UserError: They have changed; they are named.
    """
    try:
        inputs = inputs_of(module, data)
    except (UserError, OSError) as error:
        told = str(error).splitlines()[0]
        folder.on_message(f"{folder.path} is complete; what it was made from cannot be read any more ({told})")
        return
    compare_inputs(folder, inputs)
