"""Tokenizers that cannot write what a user's rows say: counted and named, or refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from support.cli import Result, call, read_json, tiny_config, write_yaml

HERBS = ("basil", "thyme", "sage", "mint", "dill", "chive", "sorrel", "anise")


def with_tokenizer(llama: Path, folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> Path:
    """The tiny model under another tokenizer."""
    shutil.copytree(llama, folder)
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    return folder


def lowering() -> PreTrainedTokenizerFast:
    """Bytes of lower-cased text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<|end|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


def words(*known: str, unknown: bool) -> PreTrainedTokenizerFast:
    """Whole words; what is not known is `<unk>`, which transformers is told of, or not."""
    vocab = {word: i for i, word in enumerate(["<|end|>", "<unk>", *known])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>"} if unknown else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", **special)


def fit(folder: Path, model: Path, rows: dict[str, list[tuple[str, str]]], *words: str, **options: Any) -> Result:
    """A run on rows (prompt, completion) by split."""
    config = tiny_config(folder / "data", model)
    files = {}
    for split, part in rows.items():
        files[split] = str(folder / f"{split}.jsonl")
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in part]
        Path(files[split]).write_text("\n".join(lines), encoding="utf-8")
    template = {"prompt": "{prompt}\n", "completion": "{completion}", "max_prompt_tokens": 48, "max_tokens": 64}
    init = {**files, "kind": "generative", "template": template, **options}
    config["data"]["domains"] = {"herbs": {"class_path": "residency.domains.Jsonl", "init_args": init}}
    return call("fit", "--config", write_yaml(folder / "c.yaml", config), "--run_dir", folder / "run", *words)


def asked(answer: Any, *, start: int = 0, count: int = 24) -> list[tuple[str, str]]:
    return [(f"bed {i} of {HERBS[i % 8]}", answer(HERBS[i % 8])) for i in range(start, start + count)]


def findings(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in read_json(folder / "run/results.json")["data"]["findings"]}


def test_answers_that_a_lowering_tokenizer_cannot_write_are_named(llama: Path, tmp_path: Path) -> None:
    """On the console and in the record: a score of whole texts is low by construction."""
    model = with_tokenizer(llama, tmp_path / "model", lowering())
    train = [(f"{herb} is", herb.title()) for herb in HERBS]
    rows = {"train": train, "test": [(f"a {herb} is", herb.title()) for herb in HERBS]}
    found = fit(tmp_path, model, rows, max_validation=0)
    assert found.code == 0, found.err
    assert "8 of 8 completions cannot be written exactly with this tokenizer" in " ".join(found.out.split())
    changed = findings(tmp_path)["changed_answer"]
    assert (changed["count"], changed["severity"]) == (8, "error")


def test_most_answers_unknown_is_refused(llama: Path, tmp_path: Path) -> None:
    prompts = [str(i) for i in range(100)] + ["bed", "of", *HERBS]
    for told in (True, False):
        folder = tmp_path / f"unknown-{told}"
        folder.mkdir()
        model = with_tokenizer(llama, folder / "model", words(*prompts, unknown=told))
        rows = {"train": asked(lambda herb: f"{herb}ish"), "test": asked(lambda herb: f"{herb}ish", start=60, count=8)}
        found = fit(folder, model, rows)
        assert found.code == 2, found.out
        assert "unknown" in found.err
        assert "why" in found.err
        assert not list((folder / "run").rglob("*.safetensors"))


def test_a_few_unknown_answers_are_counted(llama: Path, tmp_path: Path) -> None:
    prompts = [str(i) for i in range(100)] + ["bed", "of", *HERBS]
    model = with_tokenizer(llama, tmp_path / "model", words(*prompts, unknown=True))
    train = asked(lambda herb: herb, count=40)
    train[3] = (train[3][0], "verbena")
    found = fit(
        tmp_path, model, {"train": train, "test": asked(lambda herb: herb, start=60, count=8)}, max_validation=0
    )
    assert found.code == 0, found.err
    assert "herbs, train: 1 of 228 tokens stand for text that the tokenizer does not know" in found.out


def test_the_name_of_a_control_token_in_an_answer_is_text(llama: Path, tmp_path: Path) -> None:
    """Not the end of the answer: it is read and written letter by letter."""
    rows = {"train": asked(lambda herb: herb), "test": asked(lambda herb: herb, start=60, count=8)}
    rows["train"][0] = (rows["train"][0][0], "say <|end|> twice")
    found = fit(tmp_path, llama, rows, max_validation=0)
    assert found.code == 0, found.err
    tokenizer = AutoTokenizer.from_pretrained(llama)
    from residency.runs.cli import parse

    data = parse(["fit", "--config", str(tmp_path / "c.yaml")]).datamodule
    template, (row,) = (
        data.domains["herbs"].template,
        [r for r in data.domains["herbs"].rows("train") if r.completion.startswith("say")],
    )
    ids = template.encode(tokenizer, domain="herbs", row=row).completion
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "say <|end|> twice"


def test_tokens_without_a_row_of_the_embedding_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["[verbena]"])
    model = with_tokenizer(llama, tmp_path / "model", tokenizer)
    rows = {"train": asked(lambda herb: herb), "test": asked(lambda herb: herb, start=60, count=8)}
    rows["train"] = [(f"[verbena] {prompt}", completion) for prompt, completion in rows["train"]]
    found = fit(tmp_path, model, rows)
    assert found.code == 2
    assert "257" in found.err
    assert "[verbena]" in found.err or "token" in found.err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("same", ["train", "test"])
def test_validation_rows_of_another_split_are_refused(same: str, llama: Path, tmp_path: Path) -> None:
    rows = {"train": asked(lambda herb: herb), "test": asked(lambda herb: herb, start=60, count=8)}
    found = fit(tmp_path, llama, {**rows, "validation": rows[same]})
    assert found.code == 2
    assert f"validation rows are {same} rows too" in " ".join(found.err.split())
