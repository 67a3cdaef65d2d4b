"""The doctor finds every planted fault, and nothing in clean files."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from residency.core.types import Kind, Row, Split
from residency.domains.base import Domain, Template
from residency.domains.doctor.clean import cleaned, write_cleaned
from residency.domains.doctor.examine import Diagnosis, examine, open_columns
from residency.domains.doctor.show import print_diagnosis, print_rows
from residency.domains.doctor.tokens import Reader
from residency.testing.tiny_models import write_tokenizer

Rows = dict[Split, list[Row]]
SIZES: dict[Split, int] = {"train": 520, "validation": 40, "test": 110}
LABELS = ("good", "bad", "neither")


class Given(Domain):
    """Rows that are here."""

    source, licence, attribution = "made here", "none", "nobody"

    def __init__(self, rows: Rows, kind: Kind, **options: Any) -> None:
        self.kind = kind
        options = {"max_train": None, "max_validation": None, "max_test": None} | options
        super().__init__(**{"template": Template(max_prompt_tokens=200, max_tokens=250), **options})
        self.given_rows = rows

    def read(self) -> Mapping[Split, Sequence[Row]]:
        return self.given_rows


def clean_rows(name: str, kind: Kind) -> Rows:
    """Sentences of invented words, no two alike."""
    draw = random.Random(name)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en")]
    words = ["".join(draw.choices(syllables, k=3)) for _ in range(900)]
    rows: Rows = {}
    for split, size in SIZES.items():
        rows[split] = [
            Row(
                id=f"{split}{i}",
                prompt=" ".join(draw.choices(words, k=9)),
                completion=LABELS[i % 3] if kind == "label" else " ".join(draw.choices(words, k=4)),
            )
            for i in range(size)
        ]
    return rows


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """One token per byte; 257 of them, 4,096 positions."""
    return Reader(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), vocabulary=257, context=4096)


def word_reader(*, unknown: str | None, lower: bool) -> Reader:
    """Whole words; those that the clean rows of `a` have are known."""
    texts = [f"{r.prompt} {r.completion}" for rows in clean_rows("a", "generative").values() for r in rows]
    known = sorted({word for text in texts for word in text.split()})
    vocab = {word: i for i, word in enumerate(["<|end|>", "<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    special = {"eos_token": "<|end|>"} | ({"unk_token": unknown} if unknown else {})
    return Reader(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def diagnose(
    rows: Rows, kind: Kind, reader: Reader, *, more: Mapping[str, Domain] | None = None, **options: Any
) -> Diagnosis:
    """Of one domain `a`, beside others."""
    domains: dict[str, Domain] = {"a": Given(rows, kind, **options), **(more or {})}
    columns, refused = open_columns(domains, probes=frozenset({"probe"} & {*domains}), strict=False)
    assert not refused
    return examine(columns, reader)


def told(diagnosis: Diagnosis) -> dict[str, str]:
    """{check: severity} of errors and warnings."""
    return {one.check: one.severity for one in diagnosis.findings if one.severity != "info"}


@pytest.mark.parametrize("kind", ["label", "generative"])
def test_clean_files_are_clean(kind: Kind, reader: Reader) -> None:
    more = {"b": Given(clean_rows("b", kind), kind), "probe": Given(clean_rows("c", "generative"), "generative")}
    found = diagnose(clean_rows("a", kind), kind, reader, more=more)
    assert told(found) == {}
    assert [one.check for one in found.findings] == []
    assert found.counts["a"]["train"].rows == SIZES["train"]


# --- planted faults ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is planted and what must be said of it."""

    plant: Callable[[Rows], Any]
    check: str
    kind: Kind = "generative"
    severity: str = "error"
    split: str = "train"
    count: int | None = None
    options: Mapping[str, Any] = None  # type: ignore[assignment]


def put(split: Split, *places: int, **parts: Any) -> Callable[[Rows], None]:
    """Change some rows; a function is called with the old text."""

    def plant(rows: Rows) -> None:
        for place in places:
            old = rows[split][place]
            new = {k: v(getattr(old, k)) if callable(v) else v for k, v in parts.items()}
            rows[split][place] = replace(old, **new)

    return plant


def copy(
    source: Split, target: Split, *places: int, change: Callable[[Row], Row] = lambda row: row
) -> Callable[[Rows], None]:
    """Let rows of one split return in another, under other ids."""

    def plant(rows: Rows) -> None:
        for place in places:
            row = change(rows[source][place])
            rows[target][place] = replace(row, id=f"copy{place}")

    return plant


def again(count: int) -> Callable[[Rows], None]:
    return lambda rows: rows["train"].extend(replace(r, id=f"again{r.id}") for r in rows["train"][:count])


def keep(split: Split, count: int) -> Callable[[Rows], None]:
    return lambda rows: rows.__setitem__(split, rows[split][:count])


def every(split: Split, **parts: Any) -> Callable[[Rows], None]:
    return lambda rows: put(split, *range(len(rows[split])), **parts)(rows)


def shouted(row: Row) -> Row:
    return replace(row, prompt=f"  {row.prompt.upper()} ! ")


def one_word_else(row: Row) -> Row:
    words = row.prompt.split()
    return replace(row, prompt=" ".join([*words[:-1], words[-1][:-1] + "x"]))


def together(*plants: Callable[[Rows], Any]) -> Callable[[Rows], None]:
    return lambda rows: [plant(rows) for plant in plants] and None


FAULTS: dict[str, Fault] = {
    "test rows in train": Fault(plant=copy("train", "test", 1, 2), check="leak", split="test", count=2),
    "test rows in train, shouted": Fault(
        plant=copy("train", "test", 1, change=shouted), check="leak", split="test", count=1
    ),
    "validation rows in train": Fault(plant=copy("train", "validation", 3), check="leak", split="validation", count=1),
    "validation is the test": Fault(
        plant=lambda rows: rows.__setitem__("validation", [*rows["test"]]), check="leak", split="validation", count=110
    ),
    "validation is the training split": Fault(
        plant=lambda rows: rows.__setitem__("validation", [*rows["train"]]), check="leak", split="validation", count=520
    ),
    "near-duplicates of training rows": Fault(
        plant=copy("train", "test", *range(8), change=one_word_else), check="near_duplicate", split="test", count=8
    ),
    "one near-duplicate": Fault(
        plant=copy("train", "test", 5, change=one_word_else), check="near_duplicate", severity="warning", split="test"
    ),
    "passages in both splits": Fault(
        plant=lambda rows: [
            put("train", i, prompt=lambda text, i=i: f"{passage(i)} {text}")(rows)
            or put("test", i, prompt=lambda text, i=i: f"{passage(i)} {text * 3}")(rows)
            for i in range(20)
        ],
        check="ngram_overlap",
        severity="warning",
        split="test",
        count=20,
    ),
    "a group in two splits": Fault(
        plant=together(put("train", 1, group="g"), put("test", 1, group="g")), check="group", split="test", count=1
    ),
    "an id twice": Fault(plant=put("test", 1, 2, id="same"), check="id_twice", split="test", count=1),
    "a fifth of the rows again": Fault(plant=again(160), check="duplicates", severity="warning", count=160),
    "two answers to one question in the test": Fault(
        plant=put("test", *range(4), prompt="one question"), check="contradiction", kind="label", split="test", count=4
    ),
    "two answers to one question": Fault(
        plant=put("train", 1, 2, prompt="one question"), check="contradiction", severity="warning", count=2
    ),
    "no completion": Fault(plant=put("train", 7, completion=" "), check="empty_completion", count=1),
    "no prompt": Fault(plant=put("train", 7, prompt=""), check="empty_prompt", severity="warning", count=1),
    "one class": Fault(
        plant=lambda rows: [every(s, completion="good")(rows) for s in rows], check="one_class", kind="label"
    ),
    "a label that training lacks": Fault(
        plant=put("test", 3, 4, completion="unheard of"), check="unseen_label", kind="label", split="test", count=2
    ),
    "a label in two spellings": Fault(
        plant=put("train", *range(0, 60, 3), completion="Good "), check="label_spelling", kind="label"
    ),
    "almost one class": Fault(
        plant=put("train", *range(490), completion="bad"), check="majority", kind="label", severity="warning"
    ),
    "a rare class": Fault(
        plant=put("train", *(i for i in range(6, 520) if i % 3 == 0), completion="bad"),
        check="imbalance",
        kind="label",
        severity="warning",
    ),
    "a class of two rows": Fault(
        plant=put("train", *(i for i in range(6, 520) if i % 3 == 0), completion="bad"),
        check="rare_label",
        kind="label",
        severity="warning",
        count=1,
    ),
    "always the same answer": Fault(
        plant=lambda rows: every("train", completion="yes of course")(rows), check="constant_answer", count=520
    ),
    "few training rows": Fault(plant=keep("train", 60), check="few_rows", severity="warning", count=60),
    "few test rows": Fault(plant=keep("test", 25), check="few_rows", severity="warning", split="test", count=25),
    "answers beyond the limit": Fault(
        plant=put("train", *range(30), completion=lambda text: text * 20), check="cut_answer", count=30
    ),
    "an answer beyond the limit": Fault(
        plant=put("train", 2, completion=lambda text: text * 20), check="cut_answer", severity="warning", count=1
    ),
    "test answers beyond the limit": Fault(
        plant=put("test", 2, 3, completion=lambda text: text * 20), check="cut_answer", split="test", count=2
    ),
    "rows too long for a template that refuses": Fault(
        plant=put("train", 2, prompt=lambda text: text * 9),
        check="too_long",
        count=1,
        options={"template": Template(max_prompt_tokens=200, max_tokens=250, too_long="refuse")},
    ),
    "a row left out": Fault(
        plant=put("train", 2, prompt=lambda text: text * 9),
        check="too_long",
        severity="info",
        count=1,
        options={"template": Template(max_prompt_tokens=200, max_tokens=250, too_long="drop")},
    ),
    "prompts beyond the limit": Fault(
        plant=put("train", *range(40), prompt=lambda text: text * 9), check="cut_prompt", severity="warning", count=40
    ),
    "control text in an answer": Fault(
        plant=put("train", 5, completion="stop <|end|> here"), check="control_text", severity="info", count=1
    ),
    "control text in a prompt": Fault(
        plant=put("test", 5, prompt=lambda t: f"<|end|>{t} <|end|>"),
        check="control_text",
        severity="info",
        split="test",
    ),
    "control characters": Fault(
        plant=put("train", 5, completion="a\x07b"), check="control_characters", severity="warning", count=1
    ),
    "carriage returns": Fault(plant=put("train", 5, prompt="a\r\nb c"), check="line_ends", severity="warning", count=1),
    "invisible characters": Fault(
        plant=put("test", 5, prompt="a\u200bb c d"), check="invisible", severity="warning", split="test", count=1
    ),
    "text in the wrong encoding": Fault(
        plant=put("train", 5, completion="fran\u00c3\u00a7ais"), check="mojibake", severity="warning", count=1
    ),
    "rests of HTML": Fault(
        plant=put("train", 5, 6, prompt="Tom &amp; Jerry #39; x"), check="html_rests", severity="warning", count=2
    ),
    "missing values of an export": Fault(
        plant=lambda rows: [put("train", i, completion="NaN", prompt=lambda t: f"{t} q")(rows) for i in range(12)],
        check="empty_words",
        severity="warning",
        count=12,
    ),
    "answers in two forms": Fault(
        plant=lambda rows: [put("train", i, completion=lambda text: json.dumps({"a": text}))(rows) for i in range(40)],
        check="two_forms",
        severity="warning",
        count=40,
    ),
    "another script in the test": Fault(
        plant=lambda rows: [
            put("test", i, prompt="".join(chr(0x4E00 + 37 * i + 101 * k) for k in range(30)))(rows) for i in range(110)
        ],
        check="script",
        severity="warning",
        split="test",
    ),
    "longer prompts in the test": Fault(
        plant=lambda rows: every("test", prompt=lambda text: f"{text} {text[::-1]} {text[5:]}")(rows),
        check="length_drift",
        severity="warning",
        split="test",
    ),
    "a limit beyond the model": Fault(
        plant=lambda rows: None,
        check="too_long_for_model",
        options={"template": Template(max_prompt_tokens=5000, max_tokens=6000)},
    ),
    "a scorer that cannot judge": Fault(
        plant=lambda rows: None, check="scorer", split="test", options={"scorers": ["numeric"]}
    ),
}


FAULTS["marks of this program's own"] = Fault(
    plant=put("train", 5, prompt=lambda text: f"{text} \U000f0000"), check="marks", severity="warning", count=1
)


def passage(number: int) -> str:
    """Fifteen words."""
    draw = random.Random(number)
    return " ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(15))


def test_there_are_forty() -> None:
    assert len(FAULTS) >= 40


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, reader: Reader) -> None:
    fault = FAULTS[name]
    rows = clean_rows("a", fault.kind)
    fault.plant(rows)
    found = diagnose(rows, fault.kind, reader, **(fault.options or {}))
    met = [one for one in found.findings if (one.check, one.split) == (fault.check, fault.split)]
    assert met, told(found)
    assert met[0].severity == fault.severity
    assert fault.count is None or met[0].count == fault.count


def test_across_domains_and_probes(reader: Reader) -> None:
    """Another domain's training rows in a test, a probe that is trained on, and labels that two domains share."""
    rows, other, probe = clean_rows("a", "label"), clean_rows("b", "label"), clean_rows("c", "generative")
    other["test"][0] = replace(rows["train"][0], id="leaked")
    probe["test"][0] = replace(other["train"][0], id="trained")
    put("train", *range(0, 520, 3), completion="great")(other)
    put("test", *range(0, 110, 3), completion="great")(other)
    put("validation", *range(0, 40, 3), completion="great")(other)
    found = diagnose(rows, "label", reader, more={"b": Given(other, "label"), "probe": Given(probe, "generative")})
    where = {(one.check, one.domain, one.split): one.severity for one in found.findings}
    assert where == {
        ("leak_across", "b", "test"): "error",
        ("leak_across", "probe", "test"): "error",
        ("shared_labels", "a", "train"): "warning",
    }


@pytest.mark.parametrize(
    ("unknown", "lower", "completion", "check"),
    [
        ("<unk>", False, "Unheard", "unknown_tokens"),
        ("<unk>", True, str.upper, "changed_answer"),
    ],
)
def test_a_tokenizer_that_cannot_write_the_answers(
    unknown: str | None, lower: bool, completion: Any, check: str
) -> None:
    rows = clean_rows("a", "generative")
    put("train", *range(300), completion=completion)(rows)
    found = diagnose(rows, "generative", word_reader(unknown=unknown, lower=lower))
    (met,) = [one for one in found.findings if one.check == check and one.split == "train"]
    assert (met.severity, met.count) == ("error", 300)


def test_tokens_that_the_model_does_not_have(reader: Reader, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.add_tokens(["[plum]"])
    rows = clean_rows("a", "generative")
    beyond = Reader(tokenizer, vocabulary=257)
    spare = diagnose(rows, "generative", beyond)
    assert [(one.check, one.severity) for one in spare.findings] == [("beyond_vocabulary", "info")]
    put("train", 3, prompt=lambda text: f"[plum] {text}")(rows)
    (met,) = diagnose(rows, "generative", beyond).findings
    assert (met.check, met.severity, met.rows) == ("beyond_vocabulary", "error", ("train3",))
    assert "[plum]" in met.got
    assert "257" in met.why


def test_what_cannot_be_read_is_one_finding_of_many(reader: Reader, tmp_path: Path) -> None:
    from residency.domains.jsonl import Jsonl

    domains: dict[str, Domain] = {
        "bad": Jsonl(train=str(tmp_path / "no.jsonl"), test=str(tmp_path / "no.jsonl")),
        "good": Given(clean_rows("a", "label"), "label"),
    }
    columns, refused = open_columns(domains, strict=False)
    assert [one.check for one in refused] == ["unreadable"]
    assert [column.name for column in columns] == ["good"]


# --- what is counted, shown and mended --------------------------------------------------------------------------------


def test_counts_are_those_of_the_template(reader: Reader) -> None:
    """Row by row, by the template that training uses."""
    rows = clean_rows("a", "generative")
    template = Template(max_prompt_tokens=70, max_tokens=104, too_long="truncate")
    found = diagnose(rows, "generative", reader, template=template, max_train=400).counts["a"]["train"]
    free = Template(max_prompt_tokens=10_000, max_tokens=20_000)
    cut_prompts = cut_answers = tokens = 0
    for row in rows["train"][:400]:
        whole, used = (t.encode(reader.tokenizer, domain="a", row=row) for t in (free, template))
        cut_prompts += len(used.prompt) < len(whole.prompt)
        cut_answers += len(used.completion) < len(whole.completion)
        tokens += len(whole.prompt) - len(used.prompt)
    assert (found.given, found.rows) == (520, 400)
    assert (found.cut_prompts, found.cut_answers, found.cut_prompt_tokens) == (cut_prompts, cut_answers, tokens)
    assert 0 < cut_answers < 400


def test_the_record_is_stable_and_the_screen_is_safe(reader: Reader) -> None:
    rows = clean_rows("a", "generative")
    put("train", 0, prompt="\x1b[31mred\x1b[0m\u202e evil")(rows)
    first, second = (diagnose(rows, "generative", reader) for _ in range(2))
    assert json.dumps(first.plain()) == json.dumps(second.plain())
    console = Console(record=True, width=200, file=io.StringIO())
    print_diagnosis(console, first)
    print_rows(console, first, reader, number=3)
    text = console.export_text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[[" in text
    assert "\u27e8<|end|>\u27e9]]" in text
    assert "\u00b7" in text


def test_a_cleaned_copy_is_clean(reader: Reader, tmp_path: Path) -> None:
    rows = clean_rows("a", "generative")
    for plant in (
        copy("train", "test", 1, 2),
        copy("test", "validation", 7),
        again(200),
        put("train", 9, completion=""),
        put("train", 10, prompt=lambda text: f"Tom &amp; {text}\r\n\u200b"),
    ):
        plant(rows)
    before = {split: [*part] for split, part in rows.items()}
    columns, _ = open_columns({"a": Given(rows, "generative")}, strict=False)
    kept, done = cleaned(columns[0])
    assert rows == before, "the rows themselves are left alone"
    assert done["repeated rows"] == 196
    assert len(kept["test"]) == 110
    found = diagnose(kept, "generative", reader)
    assert told(found) == {}
    written = write_cleaned(columns[0], tmp_path)
    lines = [json.loads(line) for line in Path(written["files"][0]).read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in kept["train"]]


def test_a_cleaned_copy_keeps_no_row_that_another_domain_scores() -> None:
    rows, other = clean_rows("a", "generative"), clean_rows("b", "generative")
    copy("train", "train", 0)(rows)
    other["test"][0] = rows["train"][4]
    columns, _ = open_columns({"a": Given(rows, "generative"), "b": Given(other, "generative")}, strict=False)
    kept, done = cleaned(columns[0], columns)
    assert done == {"train rows that are scored elsewhere": 1}
    assert rows["train"][4].prompt not in {row.prompt for row in kept["train"]}
