"""What a run reads from files that its config only names, by content: a run that goes on must read the same."""

from __future__ import annotations

from collections.abc import Mapping

from residency.core.errors import UserError
from residency.core.tensor_files import read_json, write_json
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.runs.folder import RunFolder

__all__ = ["inputs_of", "keep_inputs"]


def inputs_of(module: ContinualModule, data: StreamData) -> dict[str, str]:
    """{what, as a message names it: its hash}.

    Args:
        module: Not yet built; its backbone tells what lies in the model's folder.
        data: Domains and probes.
    """
    model = {f"{part} of the model": value for part, value in module.backbone.fingerprint().items()}
    return model | {f"rows or template of {name}": value for name, value in data.fingerprints().items()}


def keep_inputs(folder: RunFolder, inputs: Mapping[str, str]) -> None:
    """Write the hashes into the run's folder, or compare with those that are there once a stage is.

    Args:
        folder: Of the run; locked.
        inputs: From `inputs_of`.

    Raises:
        UserError: Files have changed since the run began; they are named.
    """
    path = folder.path / "inputs.json"
    if not (path.is_file() and folder.begun()):
        write_json(path, dict(inputs))
        return
    old = read_json(path)
    changed = sorted(name for name in {*old, *inputs} if old.get(name) != inputs.get(name))
    if changed:
        raise UserError(
            f"{folder.path} was begun with other files; changed since: {', '.join(changed[:6])}",
            why="one score matrix would be made of two test sets, or of two models",
            fix="bring the old files back, or choose another --run_dir (or --name)",
        )
