"""Write `study.zip` with the code of commit 91a4eba: a study that was killed, its store, and the scores of the whole.

git worktree add BEFORE 91a4eba
PYTHONPATH=BEFORE/src:BEFORE/tests python tests/golden/write_study.py tests/golden/study.zip
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from sweeping import EWC, Inline, matrices, run_sweep, write_study
from tiny import write_backbone

TASKS = 4
"""The first stage, what EWC makes of it, and the second stage of both cells: no record is written yet."""


class _Killed(Inline):
    """Stops in the middle of the study, as a process that is interrupted."""

    def submit(self, task: Any) -> None:
        if len(self.ran) == TASKS:
            raise KeyboardInterrupt
        super().submit(task)


def main(target: Path) -> None:
    """The study stands in the folder it is run from, so that its files name no other place."""
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    folder = Path()
    write_backbone(folder / "llama")
    axes = {"mitigation": {"none": {}, "ewc": EWC(100.0)}}
    study = write_study(folder, Path("./llama"), steps=3, domains="ab", axes=axes, scorer="nll")
    code, out = run_sweep(study, folder / "whole", store=folder / "whole-store")
    assert code == 0, out
    scores = {name: found["nll"]["R"] for name, found in matrices(folder / "whole").items()}
    with contextlib.suppress(KeyboardInterrupt):
        run_sweep(study, folder / "study", executor=_Killed, store=folder / "store")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(p for name in ("study", "store") for p in (folder / name).rglob("*") if p.is_file()):
            archive.write(path)
        for name in ("base.yaml", "study.yaml"):
            archive.write(name)
        archive.writestr("whole.json", json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
