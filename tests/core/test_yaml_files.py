"""One reader of YAML: what it gives is what the safe loader gives, and no text takes its time, memory or stack."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import yaml

from residency.core.errors import UserError
from residency.core.yaml_files import MAX_BYTES, YamlRefused, check_yaml, parse_yaml, read_yaml

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "aliases": (LAUGHS, "aliases"),
    "a list in itself": ("a: &a [*a]", "inside of itself"),
    "a mapping in itself": ("&a {b: {c: *a}}", "inside of itself"),
    "brackets": ("[" * 3000, "deeper"),
    "indentation": ("\n".join(" " * n + "a:" for n in range(200)), "deeper"),
    "NUL": ('path: "a\\0b"', "NUL"),
    "no such day": ("day: 2026-99-99", "month"),
    "number": ("x: " + "9" * 5000, "digits"),
    "key is a list": ("? [1]\n: 2", "key"),
    "key is null": ("null: 3", "key"),
    "key is a date": ("a:\n- 2026-01-01: 1", "key"),
    "key is a number": ("domains: {2024: {}}", "2024 is the name of a key"),
    "key is a truth value": ("domains:\n  on: {}", "quotes"),
    "key twice": ("a: 1\nb: 2\na: 3", "stands here and in line 1"),
    "key twice, deep": ("m:\n  x: {k: 1}\n  x: {k: 2}", "'x' stands here and in line 2"),
    "key twice, quoted": ("{a: [1, {c: 1}], 'a': 2}", "stands here"),
    "object": ("!!python/object/apply:os.system [ls]", "tag"),
    "bracket": ("a: [1", "line 2"),
    "control character": ("a: \x1b", "control"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_beyond_the_limits_is_refused_at_once(name: str) -> None:
    text, word = REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(YamlRefused, match=word):
        parse_yaml(text)
    assert time.perf_counter() - start < 2


def test_refusals_name_the_line() -> None:
    with pytest.raises(YamlRefused) as refused:
        check_yaml("a: 1\nb: &b [*b]\n")
    assert refused.value.line == 2


def test_equal_keys_of_different_mappings_and_values_that_look_like_keys_are_read() -> None:
    text = "a: {k: a, j: k}\nb: {k: a}\nc: [k, k, {k: k}]\n'2024': 2024\n? d\n: *x\n".replace("*x", "k")
    assert parse_yaml(text) == yaml.safe_load(text)


def test_aliases_and_merges_of_usual_size_are_read() -> None:
    text = "base: &base {lr: 0.1, betas: [0.9, 0.99]}\none: {<<: *base, lr: 0.2}\ntwo: [*base, *base]\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_every_preset_and_study_reads_as_with_the_safe_loader() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    assert len(files) > 50
    for file in files:
        assert read_yaml(file, what="a preset") == yaml.safe_load(file.read_text(encoding="utf-8"))


def test_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "x[1].yaml"
    file.write_text("a: 1\nb: [\n")
    with pytest.raises(UserError, match=r"x\[1\]\.yaml, line 3 .*YAML"):
        read_yaml(file, what="the config")
    file.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match="YAML"):
        read_yaml(file, what="the config")
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path, what="the config")
    with file.open("wb") as handle:
        handle.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match="bytes"):
        read_yaml(file, what="the config")


def test_mutated_texts_give_a_value_or_a_refusal() -> None:
    """Characters of YAML's own syntax, thrown into a real config: 2,000 seeded mutations."""
    seed = (Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    draw, refused = random.Random(0), 0
    for _ in range(2000):
        text = list(seed)
        for _ in range(draw.randint(1, 6)):
            text[draw.randrange(len(text))] = draw.choice("[]{}:,&*!|>%@`'\"#-? \n\t\0\x85\u2028<~a1")
        try:
            parse_yaml("".join(text))
        except YamlRefused:
            refused += 1
    assert 0 < refused < 2000
