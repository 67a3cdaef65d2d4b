"""Files of published streams in their authors' layout: O-LoRA and Natural Instructions (SAPT). TRACE is plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains.readers.records import Record, Records
from residency.domains.readers.strict_json import refuse, short

__all__ = ["INSTRUCTIONS", "olora_records", "superni_records"]

_SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."
_TOPIC = "What is the topic of the following paragraph? Choose one from the option."
_RELATION = (
    'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.'
)
INSTRUCTIONS: Mapping[str, str] = {
    "SC": _SENTIMENT,
    "TC": _TOPIC,
    "NLI": _RELATION,
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.',
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.",
    "COPA": "",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.",
}
"""What O-LoRA asks, by task: the folder above a data set's (`instruction_config.json`); COPA's rows ask themselves."""


def olora_records(folder: Path, found: Mapping[Split, Records]) -> dict[Split, Records]:
    """Sentences and labels of O-LoRA as prompts and completions.

    Args:
        folder: `<Task>/<Dataset>` with `labels.json`; the task's name says what is asked.
        found: Its splits. `dev.json` of these files is `test.json`, byte for byte: as validation it is refused by being
            left out, and a tenth of the training rows takes its place.

    Raises:
        UserError: A task whose instruction is not known, or labels that are no list of texts.
    """
    task = folder.resolve().parent.name
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    if task not in INSTRUCTIONS or not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise UserError(
            f"{str(folder)!r}: task {task!r} with labels {short(labels)}",
            why="the folder above the data set names the task, and labels.json lists its labels",
            fix=f"name it {', '.join(INSTRUCTIONS)}, or remove labels.json and give prompts and completions",
        )
    asked = f"{INSTRUCTIONS[task]}\n" if INSTRUCTIONS[task] else ""
    start = f"{asked}Option: {', '.join(labels)} \n"
    kept = {split: records for split, records in found.items() if split != "validation"}
    return {split: _asked(records, start) for split, records in kept.items()}


def _asked(records: Records, start: str) -> Records:
    rows = []
    for record in records.rows:
        value = record.value
        if not isinstance(value.get("sentence"), str) or "label" not in value:
            got = f"columns {', '.join(sorted(value))}"
            refuse(record.where, got, why='rows of O-LoRA are {"sentence", "label"}', fix="give the authors' files")
        prompt = f"{start}{value['sentence']}\nAnswer:"
        rows.append(Record(record.where, record.number, {"prompt": prompt, "label": value["label"]}))
    return Records(rows=rows, class_names={})


def superni_records(document: Mapping[str, Any], where: str) -> Records:
    """The instances of a task of Natural Instructions as prompts, completions and further references.

    The prompt is SAPT's: definition, then the input. Of several outputs the first is learnt; all are references.

    Raises:
        UserError: The object is no such task.
    """
    instances = document.get("Instances")
    if not isinstance(instances, list) or not instances:
        got = f"one object with the keys {', '.join(sorted(document))}"
        fix = 'write an array of rows, or "Definition" and "Instances" as in Natural Instructions'
        refuse(where, got, why="a JSON file is an array of rows, or one task of Natural Instructions", fix=fix)
    definition = document.get("Definition", "")
    definition = definition[0] if isinstance(definition, list) and definition else definition
    start = f"Definition: {definition}\n\nNow complete the following example -\nInput: "
    rows = []
    for number, instance in enumerate(instances, 1):
        place = f"{where}, instance {number}"
        if not isinstance(instance, dict) or not isinstance(instance.get("input"), str):
            refuse(place, short(instance), why='instances are {"input", "output"}', fix="give the authors' files")
        outputs = instance.get("output")
        outputs = outputs if isinstance(outputs, list) else [outputs]
        if not outputs or not all(isinstance(text, str) and text.strip() for text in outputs):
            refuse(place, f"output {short(outputs)}", why="an output is a text, or a list of them", fix="write one")
        row = {"prompt": f"{start}{instance['input']}\nOutput: ", "completion": outputs[0], "references": outputs[1:]}
        rows.append(Record(place, number, row | ({"id": instance["id"]} if instance.get("id") else {})))
    return Records(rows=rows, class_names={})
