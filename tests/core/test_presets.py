"""Presets by name: the package's, the user's own before them, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.core.presets import CONFIGS, KINDS, component_kind, find_preset, list_presets, named_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESIDENCY_PRESETS", raising=False)


def test_every_file_of_configs_is_a_preset_with_one_sentence() -> None:
    files = {path.resolve() for path in (ROOT / "configs").rglob("*.yaml")}
    found = list_presets()
    assert {preset.path.resolve() for preset in found} == files
    assert not [preset.name for preset in found if not 10 < len(preset.summary) <= 200]


def test_a_name_is_found_from_any_folder_and_a_class_is_no_preset() -> None:
    assert find_preset("adapter", "lora") == (ROOT / "configs/adapter/lora.yaml").resolve()
    assert find_preset("mitigation", "EWC") is None
    assert find_preset("adapter", "../adapter/lora") is None
    assert named_file("quickstart", kinds=CONFIGS, what="the config").name == "quickstart.yaml"
    assert named_file("trainer/cpu", kinds=CONFIGS, what="the config").parent.name == "trainer"


def test_the_users_own_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "configs/adapter", tmp_path / "lab/adapter"):
        folder.mkdir(parents=True)
        (folder / "lora.yaml").write_text("# residency fit\n# Ours, of et al. 2020. More.\nclass_path: x.Y\n")
    assert find_preset("adapter", "lora") == tmp_path / "configs/adapter/lora.yaml"
    monkeypatch.setenv("RESIDENCY_PRESETS", str(tmp_path / "lab"))
    assert find_preset("adapter", "lora") == tmp_path / "lab/adapter/lora.yaml"
    (own,) = [preset for preset in list_presets("adapter") if preset.name == "lora"]
    assert own.summary == "Ours, of et al. 2020"


def test_a_file_counts_more_than_a_name(tmp_path: Path) -> None:
    (tmp_path / "quickstart").write_text("name: mine\n")
    assert named_file("quickstart", kinds=CONFIGS, what="the config") == Path("quickstart")


def test_what_was_probably_meant() -> None:
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        named_file("quickstrat", kinds=CONFIGS, what="the config")
    with pytest.raises(UserError, match="did you mean 'mitigation'"):
        list_presets("mitigations")


def test_a_missing_file_is_left_to_its_reader() -> None:
    assert named_file("nothing/here.yaml", kinds=CONFIGS, what="the config") == Path("nothing/here.yaml")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.adapter", "adapter"),
        ("model.mitigations.any", "mitigation"),
        ("data.probes.x", "domain"),
        ("stages.legal.objective", "objective"),
        ("model.mitigations", None),
        ("model.mitigations.any.strength", None),
    ],
)
def test_which_key_takes_which_kind(key: str, kind: str | None) -> None:
    assert component_kind(key) == kind
    assert kind is None or kind in KINDS
