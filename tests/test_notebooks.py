"""The notebooks run from beginning to end on a finished study, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.synthetic_studies import QUICKSTART, write_study

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (residency[dev])")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_kept(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]


# Kernels open sockets and pipes of their own, which end after the test does.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_from_a_study_to_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (residency[dev])")
    matrices = {name: QUICKSTART[name] for name in ("none", "replay")}
    study = write_study(tmp_path / "study", matrices, seeds=(0, 1), rows=4, unfinished=("replay-s1",))
    monkeypatch.setenv("STUDY", str(study))
    monkeypatch.setenv("FIGURES", str(tmp_path / "figures"))
    notebook = nbformat.read(NOTEBOOKS / "01_forgetting.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream")
    assert "3 runs, 1 cells missing: ['replay-s1']" in said
    assert "one seed says nothing about other seeds" in said
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        f"{name}.{end}" for name in ("matrices", "plane", "loss") for end in ("pdf", "svg")
    }
