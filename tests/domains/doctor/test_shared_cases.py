"""The doctor on small inputs made after public bug reports: each fault is named, and what is right is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from residency.domains.base import Domain, Template
from residency.domains.doctor.examine import Diagnosis, examine, open_columns
from residency.domains.doctor.tokens import Reader
from residency.domains.jsonl import Jsonl
from residency.testing.tiny_models import write_tokenizer

CASES = Path(__file__).parents[3] / ".." / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
SPLITS = ("train", "validation", "test")


def opened(name: str) -> dict[str, Domain]:
    """The domains of a case's config; files that it shares with another case lie there."""
    config = yaml.safe_load((CASES / name / "config.yaml").read_text(encoding="utf-8"))
    found: dict[str, Domain] = {}
    for domain, entry in config["data"]["domains"].items():
        options = dict(entry["init_args"])
        for split in {*SPLITS} & {*options}:
            own, shared = CASES / name / options[split], CASES / "A23_valleak" / options[split]
            options[split] = str(own if own.is_file() else shared)
        found[domain] = Jsonl(**{**options, "template": Template(**options["template"])})
    return found


def in_bytes(folder: Path, name: str) -> Reader:
    return Reader(write_tokenizer(folder), vocabulary=257, context=4096)


def in_lower_case(folder: Path, name: str) -> Reader:
    tokenizer = write_tokenizer(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return Reader(tokenizer)


def with_stop(folder: Path, name: str) -> Reader:
    tokenizer = write_tokenizer(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<stop>"]})
    return Reader(tokenizer)


def with_plum(folder: Path, name: str) -> Reader:
    tokenizer = write_tokenizer(folder)
    tokenizer.add_tokens(["[plum]"])
    return Reader(tokenizer, vocabulary=257)


def in_words_of_prompts(folder: Path, name: str) -> Reader:
    """Whole words, of which no answer is known; with the case's name says whether transformers is told `<unk>`."""
    texts = [json.loads(line)["prompt"] for line in (CASES / name / "kitchen-train.jsonl").read_text().splitlines()]
    vocab = {word: k for k, word in enumerate(["<|end|>", "<unk>", *sorted({w for t in texts for w in t.split()})])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    told = {} if name.endswith("nounk") else {"unk_token": "<unk>"}
    return Reader(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", **told))


FOUND: dict[str, tuple[Callable[[Path, str], Reader], str, str, str]] = {
    "A18_oneclass": (in_bytes, "one_class", "train", "error"),
    "A19_classinc": (in_bytes, "one_class", "train", "error"),
    "A23_valleak": (in_bytes, "leak", "validation", "error"),
    "A23b_valtrain": (in_bytes, "leak", "validation", "error"),
    "B02_longcompletion": (in_bytes, "too_long", "train", "error"),
    "B05_lower": (in_lower_case, "changed_answer", "train", "error"),
    "B06_unk": (in_words_of_prompts, "unknown_tokens", "train", "error"),
    "B06b_nounk": (in_words_of_prompts, "unknown_tokens", "train", "error"),
    "B08_literal": (with_stop, "control_text", "train", "info"),
    "B10_vocab": (with_plum, "beyond_vocabulary", "train", "error"),
}
"""{case: (tokenizer, check, split, severity)}."""


def diagnosed(name: str, reader: Reader) -> tuple[Diagnosis, list[Any]]:
    columns, refused = open_columns(opened(name), strict=False)
    return examine(columns, reader), refused


@pytest.mark.parametrize("name", FOUND)
def test_the_fault_of_a_case_is_named(name: str, tmp_path: Path) -> None:
    tokenizer, check, split, severity = FOUND[name]
    diagnosis, refused = diagnosed(name, tokenizer(tmp_path, name))
    assert not refused
    met = [one for one in diagnosis.findings if (one.check, one.split) == (check, split)]
    assert met, [(one.check, one.split, one.severity) for one in diagnosis.findings]
    assert {one.severity for one in met} == {severity}
    assert {one.domain for one in met} == {*opened(name)}


def test_a_key_twice_is_named_with_its_line(tmp_path: Path) -> None:
    diagnosis, (refused,) = diagnosed("A13_dupkey", in_bytes(tmp_path, ""))
    assert (refused.check, refused.severity) == ("unreadable", "error")
    assert "line 25" in refused.got
    assert "twice" in refused.got
    assert not diagnosis.counts


@pytest.mark.parametrize("name", ["A03b_cr", "A08_array", "A10_messages", "A10b_msglists"])
def test_what_was_not_read_once_is_read(name: str) -> None:
    (domain,) = opened(name).values()
    assert len(domain.rows("train", checked=False)) + len(domain.rows("validation", checked=False)) == 24
