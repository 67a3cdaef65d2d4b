"""The README of an exported stage, as Markdown with the front matter that model hubs read."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from residency.core.text import printable

__all__ = ["merge_card", "model_card", "text"]

# Licences that a hub knows by these names; everything else is "other", and is spelled out below.
_HUB_LICENCES = frozenset({"apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0"})

# What a packaged model was made from; its weights are a copy, as the card says.
_BASES = {"SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}

_TOLD = "These scores were taken with the name of each domain known, which decided what answered."

_KINDS, _TASKS = {"classifier": "text classifier"}, {"classifier": "text-classification"}

_LOAD_ADAPTER = """\
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(BASE)     # the base model named above
    model = PeftModel.from_pretrained(base, FOLDER)       # this folder
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""
_LOAD_MODEL = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER)  # this folder
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""
_LOAD_OWN = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from residency.adapters.export_format import attach_exported

    base = AutoModelForCausalLM.from_pretrained(BASE)     # the base model named above
    adapter, model = attach_exported(base, FOLDER)        # this folder
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""


def text(value: object) -> str:
    """A name from data as Markdown that shows it and does nothing else: no markup, no HTML, no line break."""
    return re.sub(r"([\\`*_{}\[\]()|~$:!])", r"\\\1", html.escape(printable(value, limit=120), quote=False))


def model_card(facts: Mapping[str, Any]) -> str:
    """The card.

    Args:
        facts: As `export_saved` writes them to residency.json, with `format`: `peft`, `transformers` or `residency`.
    """
    stage, stream = facts["stage"], facts["stream"]
    backbone = facts["backbone"]
    what = "merged into the weights" if facts["merged"] else "as trained"
    order = " → ".join(f"**{text(name)}**" if i == stage else text(name) for i, name in enumerate(stream, 1))
    lines = [
        _front_matter(facts),
        f"# {text(facts['name'])}: stage {stage} of {len(stream)}",
        f"A {_KINDS.get(facts.get('family', ''), 'language model')} that was fine-tuned on one domain after another, "
        f"as it was after {text(stream[stage - 1])} ({what}; adapter {text(facts['adapter'])}, seed {facts['seed']}).",
        f"Stream: {order}",
        "## Base model",
        f"{text(backbone['name'])}, revision {text(backbone.get('revision') or 'not given')}, "
        f"licence: {text(backbone['licence'])}. {text(backbone.get('remark', ''))}".strip(),
        f"Weights SHA-256 {text(backbone.get('weights', 'unknown'))}.",
        "## Use",
        _use(facts),
        f"## Scores on {text(facts['split'])} rows",
        *([_TOLD] if facts["task_id_at_test"] else []),
        *_scores(facts),
        "## Licences of the data",
        _table(["domain", "licence"], [[text(n), text(licence)] for n, licence in facts["licences"].items()]),
        f"Written by residency {text(facts['versions']['residency'])}; all facts are in residency.json.",
    ]
    return "\n\n".join(lines) + "\n"


def merge_card(facts: Mapping[str, Any]) -> str:
    """The card of several stages that were merged; nobody has scored the result.

    Args:
        facts: As `merge_exports` writes them to residency.json.
    """
    backbone, how = facts["backbone"], facts["merge"]
    rows = [
        [text(one["name"]), str(one["stage"]), text(one["domain"]), f"{weight:g}"]
        for one, weight in zip(facts["merged_from"], how["weights"], strict=True)
    ]
    name = f"{text(how['method'])} of {len(rows)} stages"
    lines = [
        _front_matter({**facts, "name": name, "stage": "merged"}),
        f"# {name}",
        f"Stages of runs that fine-tuned one base model on one domain after another, merged by {text(how['method'])} "
        f"(density {how['density']:g}, seed {how['seed']}). The result has not been scored.",
        _table(["run", "stage", "domain", "factor"], rows),
        "## Base model",
        f"{text(backbone['name'])}, licence: {text(backbone['licence'])}.",
        "## Use",
        {"peft": _LOAD_ADAPTER, "transformers": _LOAD_MODEL}[facts["format"]],
        "## Licences of the data",
        _table(["domain", "licence"], [[text(n), text(licence)] for n, licence in facts["licences"].items()]),
        f"Written by residency {text(facts['versions']['residency'])}; all facts are in residency.json.",
    ]
    return "\n\n".join(lines) + "\n"


def _use(facts: Mapping[str, Any]) -> str:
    lines = {"peft": _LOAD_ADAPTER, "transformers": _LOAD_MODEL, "residency": _LOAD_OWN}[facts["format"]]
    if facts.get("family") == "encoder-decoder":
        return lines.replace("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    if facts.get("family") == "classifier":
        names = dict(enumerate(facts["labels"]))
        if str(facts["backbone"].get("head", "")).startswith("masked"):
            lines += "\n\nLabels are named `domain: label`; only those of the text's own domain compete."
        sized = f"BASE, num_labels={len(names)}, id2label={names!r}, ignore_mismatched_sizes=True"
        return lines.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification").replace(
            "(BASE)", f"({sized})"
        )
    return lines


def _front_matter(facts: Mapping[str, Any]) -> str:
    licence, hub = str(facts["backbone"]["licence"]).lower(), facts.get("hub") or {}
    data = ModelCardData(
        base_model=hub.get("id") or _BASES.get(str(facts["backbone"]["name"])),
        eval_results=_results(facts),
        library_name={"peft": "peft", "transformers": "transformers"}.get(facts["format"], "residency"),
        license=licence if licence in _HUB_LICENCES else "other",
        model_name=f"{printable(facts['name'])} stage {facts['stage']}",
        pipeline_tag=_TASKS.get(facts.get("family", ""), "text-generation"),
        tags=["residency", "continual-learning", *(["adapter"] if facts["format"] == "peft" else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """Every mean of this stage, as hubs read results."""
    return [
        EvalResult(
            task_type=_TASKS.get(facts.get("family", ""), "text-generation"),
            dataset_type=re.sub(r"[^A-Za-z0-9_-]+", "_", column)[:60].strip("_") or "domain",
            dataset_name=printable(column),
            dataset_split=str(facts["split"]),
            metric_type=scorer,
            metric_value=value,
        )
        for scorer, row in facts["scores"].items()
        for column, value in row.items()
    ]


def _scores(facts: Mapping[str, Any]) -> list[str]:
    """A table per scorer: before training, after this stage, and what merging changed."""
    found = []
    for scorer, row in facts["scores"].items():
        tax, base = facts["merge_tax"].get(scorer, {}), facts["base_scores"].get(scorer, {})
        rows = []
        for column in row:
            learnt = column in facts["stream"][: facts["stage"]]
            role = "learnt" if learnt else "probe" if column in facts["probes"] else "not yet learnt"
            numbers = [_number(base.get(column)), _number(row[column])]
            numbers += [f"{tax[column]:+.1e}" if column in tax else "-"] if facts["merged"] else []
            rows.append([text(column), role, *numbers])
        titles = ["domain", "", "base", "this stage", *(["merged minus unmerged"] if facts["merged"] else [])]
        found += [f"{text(scorer)}:", _table(titles, rows)]
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])
