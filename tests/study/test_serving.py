"""All serving choices of a study share one trained path, and every one is what it would be alone."""

from __future__ import annotations

from pathlib import Path

from support.tiny_sweeps import alone, matrices, mitigation, run_sweep, write_study


def test_serving_choices_train_once(llama: Path, tmp_path: Path) -> None:
    axis = {
        "none": {},
        "half": mitigation("WiseFT", alpha=0.5),
        "third": mitigation("WiseFT", alpha=0.3),
        "soup": mitigation("Soup", into="serve"),
    }
    study = write_study(tmp_path, llama, domains="ab", axes={"mitigation": axis})
    code, told = run_sweep(study, tmp_path / "out")
    assert code == 0, told
    assert len(list((tmp_path / "out" / "store" / "trained").glob("*/state.safetensors"))) == 2, "of eight stages"
    found = matrices(tmp_path / "out")
    rows = {cell.removesuffix("-s0"): scores["nll"]["R"] for cell, scores in found.items()}
    assert rows["none"][1] == rows["soup"][1], "of one stage the mean is that stage"
    assert len({str(matrix[2]) for matrix in rows.values()}) == len(axis)
    for cell in ("half-s0", "soup-s0"):
        assert alone(tmp_path / "out", cell, tmp_path / "alone") == found[cell]
