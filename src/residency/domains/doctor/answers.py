"""What the answers of a domain look like: classes, forms, lengths, scripts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from residency.core.types import Row
from residency.domains.doctor.finding import Column, Finding, make_finding
from residency.domains.doctor.similarity import text_key

__all__ = ["check_forms", "check_labels", "check_shared_labels", "check_sizes", "check_text"]

_FEW_TRAIN, _FEW_TEST = 500, 100
_FORMS: Mapping[str, Callable[[str], bool]] = {
    "are JSON objects": lambda text: text[:1] == "{" and _is_object(text),
    "begin with a capital": lambda text: text[:1].isupper(),
    'end with "."': lambda text: text.endswith("."),
    "have a newline": lambda text: "\n" in text,
    "are one letter A to E": lambda text: len(text) == 1 and text in "ABCDE",
}
_SCRIPTS = {
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "Han": re.compile(r"[\u3400-\u9fff]"),
    "Kana": re.compile(r"[\u3040-\u30ff]"),
    "Hangul": re.compile(r"[\uac00-\ud7af]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
}
_SIGNS: tuple[tuple[str, str, re.Pattern[str], str], ...] = (
    ("control_characters", "warning", re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"), "control characters"),
    ("mojibake", "warning", re.compile(r"[\u00c3\u00c2][\u0080-\u00bf]|\u00e2\u20ac.|\ufffd"), "wrongly decoded text"),
    ("html_rests", "warning", re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d+);|#\d{2,3};|<br ?/?>"), "rests of HTML"),
    ("line_ends", "warning", re.compile(r"\r"), "carriage returns"),
    ("invisible", "warning", re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060\ufeff]"), "invisible characters"),
    ("marks", "warning", re.compile("[\U000f0000\U000f0001]"), "the marks U+F0000 or U+F0001, which are left out"),
    ("surrogates", "error", re.compile(r"[\ud800-\udfff]"), "lone surrogates, which no tokenizer takes"),
)
_EMPTY_WORDS = {"nan", "none", "null", "n/a", "undefined"}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def check_sizes(column: Column) -> Iterator[Finding]:
    """Too few rows to learn from or to tell two scores apart."""
    train, test = len(column.rows("train")), len(column.rows("test"))
    if not column.probe and train < _FEW_TRAIN:
        yield make_finding(
            "few_rows", "warning", (column.name, "train"), (), of=train, count=train,
            got="{n} training rows", why=f"below {_FEW_TRAIN} the same rows are read again and again",
            fix="bring 1,000 or more, or mind that few steps suffice",
        )  # fmt: skip
    if test < _FEW_TEST:
        half = 0.98 / max(test, 1) ** 0.5
        yield make_finding(
            "few_rows", "warning", (column.name, "test"), (), of=test, count=test,
            got="{n} test rows", why=f"a score of 0.5 is known to +-{half:.2f} only (95 %)",
            fix="use 100 test rows or more",
        )  # fmt: skip


def check_text(column: Column) -> Iterator[Finding]:
    """Empty texts and signs that an export or a wrong encoding leaves behind."""
    for split, rows in column.splits.items():
        where, of = (column.name, split), len(rows)
        answered = [r for r in rows if r.kind != "prompt"]
        for name, part in (("prompt", [r.id for r in rows if not r.prompt.strip()]),
                           ("completion", [r.id for r in answered if not r.completion.strip()])):  # fmt: skip
            if part:
                yield make_finding(
                    f"empty_{name}", "error" if name == "completion" else "warning", where, part, of=of,
                    got=f"{{n}} rows have an empty {name}", why="there is nothing to learn in them, or nothing asked",
                    fix="`--fix` leaves them out",
                )  # fmt: skip
        for check, severity, pattern, what in _SIGNS:
            met = [r.id for r in rows if pattern.search(r.prompt) or pattern.search(r.completion)]
            if met:
                yield make_finding(
                    check, severity, where, met, of=of,  # type: ignore[arg-type]
                    got=f"{{n}} rows have {what}", why="the model learns to write them",
                    fix="clean the source; `--fix` repairs what is unambiguous",
                )  # fmt: skip
        empty = [r.id for r in rows if r.completion.strip().lower() in _EMPTY_WORDS]
        if len(empty) > 0.01 * of:
            yield make_finding(
                "empty_words", "warning", where, empty, of=of, got='{n} completions are "nan", "None" or the like',
                why="exports write missing values so", fix="leave these rows out, or say in `meta` that they are meant",
            )  # fmt: skip


def check_labels(column: Column) -> Iterator[Finding]:
    """Classes: one only, rare, unseen, written in two ways."""
    if column.kind != "label":
        yield from _hidden_labels(column)
        return
    train = Counter(row.completion for row in column.rows("train"))
    for split in ("test", "validation"):
        rows = column.rows(split)
        unseen = [row.id for row in rows if row.completion not in train]
        if unseen and not column.probe:
            yield make_finding(
                "unseen_label", "error", (column.name, split), unseen, of=len(rows),
                got="{n} rows have a label that no training row has", why="it cannot be learnt from this domain",
                fix="correct the label, or bring training rows of it",
            )  # fmt: skip
    every = {row.completion for rows in column.splits.values() for row in rows}
    where, total = (column.name, "train"), sum(train.values())
    if len(every) == 1:
        yield make_finding(
            "one_class", "error", where, (), of=total, count=total, got=f"one label: {next(iter(every))!r}",
            why="there is nothing to tell apart: no accuracy is scored",
            fix="join the domains of a class-incremental stream into one label set, or set kind: generative",
        )  # fmt: skip
        return
    yield from _balance(train, where, total)
    same = Counter(text_key(label) for label in every)
    twice = sorted(label for label in every if same[text_key(label)] > 1)
    if twice:
        met = [r.id for r in column.rows("train") if r.completion in twice]
        yield make_finding(
            "label_spelling", "error", where, met, of=total, got=f"labels differ in case or blanks only: {twice[:4]}",
            why="they compete with each other when a label is chosen", fix="write each label in one way",
        )  # fmt: skip


def _balance(train: Counter[str], where: tuple[str, str], total: int) -> Iterator[Finding]:
    (most, times), (least, fewest) = train.most_common()[0], train.most_common()[-1]
    if times >= 0.9 * total:
        yield make_finding(
            "majority", "warning", where, (), of=total, count=times, got=f"{{n}} of {total} rows are {most!r}",
            why="always answering so is nearly right: compare accuracy with that line", fix="balance the classes",
        )  # fmt: skip
    elif times > 10 * fewest:
        yield make_finding(
            "imbalance", "warning", where, (), of=total, count=fewest,
            got=f"{most!r} has {times} rows, {least!r} {{n}}", why="rare classes are hardly learnt and hardly scored",
            fix="balance the classes, or score by class",
        )  # fmt: skip
    rare = [label for label, count in train.items() if count < 8]
    if rare:
        yield make_finding(
            "rare_label", "warning", where, (), of=len(train), count=len(rare),
            got=f"{{n}} labels with fewer than 8 training rows, such as {rare[0]!r}",
            why="a batch hardly ever has one", fix="bring rows of them, or leave them out",
        )  # fmt: skip


def _hidden_labels(column: Column) -> Iterator[Finding]:
    rows = column.rows("train")
    texts = Counter(row.completion for row in rows)
    if not rows:
        return
    top, times = texts.most_common(1)[0]
    if len(texts) == 1 or times >= 0.9 * len(rows):
        yield make_finding(
            "constant_answer", "error" if len(texts) == 1 else "warning", (column.name, "train"), (), of=len(rows),
            count=times, got=f"{{n}} of {len(rows)} completions are {top[:40]!r}",
            why="nothing else is learnt than to write it", fix="check the column that completions are read from",
        )  # fmt: skip
    elif len(texts) <= 50 and len(rows) >= 20 * len(texts) and all(len(text.split()) <= 8 for text in texts):
        yield make_finding(
            "looks_like_labels", "info", (column.name, "train"), (), of=len(rows), count=len(texts),
            got="completions are {n} different short texts", why="accuracy over labels is a better score then",
            fix="set kind: label",
        )  # fmt: skip


def check_forms(column: Column) -> Iterator[Finding]:
    """Completions in two forms, scripts and lengths that differ between training and test."""
    train, test = column.rows("train"), column.rows("test")
    if column.kind != "label" and train:
        for form, holds in _FORMS.items():
            have = [holds(row.completion.strip()) for row in train]
            share = sum(have) / len(have)
            if 0.005 <= min(share, 1 - share) <= 0.2:
                odd = [row.id for row, has in zip(train, have, strict=True) if has == (share < 0.5)]
                yield make_finding(
                    "two_forms", "warning" if "JSON" in form or "letter" in form else "info", (column.name, "train"),
                    odd, of=len(train), got=f"{share:.0%} of the completions {form}",
                    why="the model learns both forms, and scores of texts see a difference", fix="choose one form",
                )  # fmt: skip
    for name in ("prompt", "completion"):
        scripts = [_script(rows, name) for rows in (train, test)]
        if train and test and None not in scripts and scripts[0] != scripts[1]:
            yield make_finding(
                "script", "warning", (column.name, "test"), (), of=len(test), count=len(test),
                got=f"{name}s are {scripts[0]} in training and {scripts[1]} in the test",
                why="another language is tested than learnt", fix="check the files",
            )  # fmt: skip
    if len(train) >= 20 and len(test) >= 20 and not column.probe:
        sizes = [median(len(row.prompt) for row in rows) for rows in (train, test)]
        if not 0.5 <= sizes[1] / max(sizes[0], 1) <= 2:
            yield make_finding(
                "length_drift", "warning", (column.name, "test"), (), of=len(test), count=len(test),
                got=f"prompts have {sizes[0]:.0f} characters in training and {sizes[1]:.0f} in the test (medians)",
                why="something else is tested than learnt", fix="check that both come from one source",
            )  # fmt: skip


def _script(rows: Sequence[Row], part: str) -> str | None:
    """The script of most letters, if two thirds are of one."""
    text = "".join(getattr(row, part)[:200] for row in rows[:500])
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    total = sum(counts.values())
    best = max(counts, key=counts.__getitem__)
    return best if total >= 20 and counts[best] > 0.66 * total else None


def check_shared_labels(columns: Sequence[Column]) -> Iterator[Finding]:
    """Domains whose label sets overlap in part."""
    sets = {c.name: {text_key(r.completion) for r in c.rows("train")} for c in columns if c.kind == "label"}
    names = sorted(sets)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = sets[a] & sets[b]
            if both and sets[a] != sets[b]:
                yield make_finding(
                    "shared_labels", "warning", (a, "train"), (), of=len(sets[a]), count=len(both),
                    got=f"{{n}} labels are those of {b} too, such as {sorted(both)[0]!r}, the rest are not",
                    why="what looks like forgetting can be the other domain's labels",
                    fix="give the labels of each domain names of their own",
                )  # fmt: skip
