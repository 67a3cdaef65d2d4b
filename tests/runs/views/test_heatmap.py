"""Heat maps: one scale, numbers in the cells, names that stay data, files that are whole or absent."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import vl_convert

from residency.core.errors import UserError
from residency.runs.views.heatmap import comparison, heat_map, save

Record = dict[str, Any]


def record(cell: str = "none-s0", *, domains: tuple[str, ...] = ("medical", "legal"), best: float = 1.41) -> Record:
    matrix = [[5.68, 11.15, 4.10], [best, 9.60, 4.35], [3.69, 2.10, None]]
    entry = {"higher_is_better": False, "unit": "nats per completion token", "R": matrix}
    accuracy = {"higher_is_better": True, "unit": "share", "R": [[0.25, None], [0.62, None], [0.41, None]]}
    scores = {"nll": entry, "accuracy": accuracy}
    return {"cell": cell, "status": "done", "domains": [*domains], "probes": ["chat"], "scores": scores}


def marks(spec: object, kind: str, **wanted: object) -> list[dict[str, Any]]:
    """All layers of one mark, depth first."""
    if isinstance(spec, list):
        return [found for part in spec for found in marks(part, kind, **wanted)]
    if not isinstance(spec, dict):
        return []
    mark = spec.get("mark")
    own = [spec] if isinstance(mark, dict) and mark["type"] == kind and wanted.items() <= mark.items() else []
    return own + [found for part in spec.values() for found in marks(part, kind, **wanted)]


def values(spec: dict[str, Any], layer: dict[str, Any]) -> list[dict[str, Any]]:
    data: dict[str, Any] = {"values": spec["datasets"].get(layer["data"].get("name"))} | layer["data"]
    found: list[dict[str, Any]] = data["values"]
    return found


def words(svg: Path) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.parse(svg).iter() if node.tag.endswith("}text")]


def scales(spec: dict[str, Any]) -> set[str]:
    found = (layer["encoding"]["color"]["scale"] for layer in marks(spec, "rect") if "color" in layer["encoding"])
    return {json.dumps(scale, sort_keys=True) for scale in found}


def test_every_number_is_printed_and_missing_is_a_dash(tmp_path: Path) -> None:
    _, svg = save(heat_map(record(), "nll"), tmp_path / "R")
    shown = words(svg)
    for number in ("5.68", "11.15", "4.10", "1.41", "9.60", "4.35", "3.69", "2.10", "-"):
        assert shown.count(number) == 1
    for word in ("base", "after medical", "after legal", "medical", "legal", "chat", "domains", "probes"):
        assert word in shown
    assert "none-s0: nll after every stage" in shown
    assert any("lower is better" in word for word in shown)


def test_the_diagonal_is_outlined() -> None:
    spec = heat_map(record(), "nll").to_dict()
    outlined = [(v["after"], v["name"]) for m in marks(spec, "rect", filled=False) for v in values(spec, m)]
    assert outlined == [("after medical", "medical"), ("after legal", "legal")]


def test_dark_is_good_in_both_directions() -> None:
    (loss,), (share,) = (map(json.loads, scales(heat_map(record(), s).to_dict())) for s in ("nll", "accuracy"))
    assert loss["domain"] == [1.41, 11.15]
    assert loss["range"][0] == share["range"][-1] == "#08306b"
    # Losses over a wide ratio are shown on a log scale, shares never are.
    assert (loss["type"], share["type"]) == ("log", "linear")


def test_numbers_are_readable_on_their_shade() -> None:
    spec = heat_map(record(), "nll").to_dict()
    ink = {v["text"]: m["mark"]["color"] for m in marks(spec, "text") for v in values(spec, m)}
    assert ink["1.41"] == "white"
    assert ink["11.15"] != "white"


def test_a_comparison_has_one_scale_and_names_what_is_not_shown(tmp_path: Path) -> None:
    failed = {"cell": "lwf-s0", "status": "failed"}
    chart = comparison([record(), record("ewc-s0", best=1.0), failed], "nll")
    (scale,) = scales(chart.to_dict())
    assert json.loads(scale)["domain"] == [1.0, 11.15]
    _, svg = save(chart, tmp_path / "all")
    shown = words(svg)
    assert {"none-s0", "ewc-s0"} <= {*shown}
    assert any("not shown: lwf-s0 (failed)" in word for word in shown)
    assert sum("log scale" in word for word in shown) == 1  # one legend


@pytest.mark.parametrize(
    "matrix",
    [
        [[None] * 3] * 3,
        [[1.0] * 3] * 3,
        [[0.0, -1.0, 2.0]] * 3,
        [[5.68, 11.15, 4.10]],
        [[float("nan"), 2.0, float("inf")]] * 3,
    ],
    ids=["nothing known", "all equal", "not positive", "stopped early", "not finite"],
)
def test_odd_matrices_are_drawn(matrix: list[list[float | None]], tmp_path: Path) -> None:
    odd = record()
    odd["scores"]["nll"]["R"] = matrix
    _, svg = save(heat_map(odd, "nll"), tmp_path / "R")
    assert "after legal" in words(svg)


def test_an_unfinished_run_and_a_told_domain_are_disclosed() -> None:
    spec = heat_map(record() | {"status": "failed", "task_id_at_test": True}, "nll").to_dict()
    assert spec["title"]["text"].startswith("none-s0 (failed, told the domain at test time)")


def test_missing_scorers_are_errors() -> None:
    with pytest.raises(UserError, match="rouge"):
        heat_map(record(), "rouge")
    with pytest.raises(UserError, match="none of 1 cells"):
        comparison([{"cell": "a", "status": "failed"}], "nll")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    script, climb = "<script>alert(1)</script>", "../../x"
    hostile = record(f"</text>{script}\x1b[2J", domains=(script, climb)) | {"probes": [script]}
    paths = save(heat_map(hostile, "nll"), tmp_path / "in" / "R")
    assert sorted(tmp_path.rglob("*.*")) == sorted(paths)
    tree = ElementTree.parse(paths[1])  # well formed, so every name was escaped
    assert not [node.tag for node in tree.iter() if "script" in node.tag]
    assert not [key for node in tree.iter() for key in node.attrib if key.startswith("on") or key.endswith("href")]
    shown = words(paths[1])
    assert climb in shown
    assert f"after {script}" in shown
    assert not any("\x1b" in word for word in shown)


def test_equal_names_do_not_fall_onto_each_other() -> None:
    spec = heat_map(record(domains=("same", "same")), "nll").to_dict()
    cells = [(v["after"], v["name"]) for m in marks(spec, "text") for v in values(spec, m)]
    assert len(cells) == len({*cells}) == 9


def test_save_writes_a_png_of_twice_the_size_and_keeps_dots_in_the_name(tmp_path: Path) -> None:
    png, svg = save(heat_map(record(), "nll"), tmp_path / "new" / "stream.v2")
    assert (png.name, svg.name) == ("stream.v2.png", "stream.v2.svg")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    root = ElementTree.parse(svg).getroot()
    assert width == pytest.approx(2 * float(root.attrib["width"]), abs=2)
    assert height == pytest.approx(2 * float(root.attrib["height"]), abs=2)
    assert not list(png.parent.glob(".*"))


def test_a_failed_conversion_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save(heat_map(record(), "nll"), tmp_path / "R")
    before = [path.read_bytes() for path in paths]

    def broken(*_: object, **__: object) -> str:
        raise ValueError("no")

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", broken)
    with pytest.raises(ValueError, match="no"):
        save(heat_map(record(best=0.5), "nll"), tmp_path / "R")
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)
