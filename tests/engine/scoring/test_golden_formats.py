"""From a file to tokens, mask and scores, for every format: against bytes by hand and the plain model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM

from residency.adapters import Full
from residency.backbones import CausalLM
from residency.domains import Chat, Table
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.row_scores import Evaluation
from residency.engine.scoring.settings import EvaluationSettings
from residency.objectives import SFT
from residency.testing.tiny_models import write_tokenizer
from support.format_files import CHATS, FIVE, TEXTS, lines, said

TRAIN = [
    ("first other", "4"),
    ("second other", "Paris"),
    ("third", "groß, 大"),
    ("4th", 'a "quoted, text"'),
    ("v", "NA"),
]
TURNS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
INSTRUCTION = "What is the sentiment of the following paragraph? Choose one from the option.\nOption: Good, Bad \n"
Golden = tuple[str, str]
"""What the model reads, and what it should write before its end token."""


def ids(text: str) -> list[int]:
    """Tokens of a text: the place of each of its UTF-8 bytes in the sorted byte alphabet, behind the end token's."""
    shown = "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index(symbol) + 1 for symbol in shown]


def asked(prompt: str, completion: str, *, name: str = "") -> Golden:
    """A row of the plain template."""
    if name == "superni":
        prompt = f"Definition: d\n\nNow complete the following example -\nInput: {prompt}\nOutput: "
    return f"{prompt}\n", f" {completion}"


def talked(prompt: str, completion: str) -> Golden:
    """The same as a conversation of `TURNS`."""
    return f"user: {prompt}\nassistant: ", completion


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A tiny model that has learnt the first two of the five rows, as plain text and as turns."""
    folder = tmp_path_factory.mktemp("learnt")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama)
    rows = [form(*pair) for form in (asked, talked) for pair in FIVE[:2]]
    batch = [(ids(prompt), [*ids(answer), 0]) for prompt, answer in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = sum(nll(model, prompt, answer) for prompt, answer in batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def module(learnt: Path) -> ContinualModule:
    found = ContinualModule(backbone=CausalLM(path=str(learnt)), adapter=Full(), objective=SFT())
    found.build(seed=0)
    return found


@pytest.fixture(scope="module")
def plain(learnt: Path) -> nn.Module:
    found: nn.Module = AutoModelForCausalLM.from_pretrained(learnt).eval()
    return found


def nll(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Transformers' own loss of an answer, summed over its tokens."""
    labels = torch.tensor([[*[-100] * len(prompt), *answer]])
    loss: torch.Tensor = model(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss
    return loss * len(answer)


def greedy(model: nn.Module, prompt: Sequence[int], *, limit: int) -> list[int]:
    """The likeliest token one after another, each by a whole pass."""
    written: list[int] = []
    for _ in range(limit):
        token = int(model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1].argmax())
        if token == 0:
            break
        written.append(token)
    return written


def scored(folder: Path, module: ContinualModule, file: Callable[[Any, Path], Path], **options: Any) -> Any:
    """(test rows in the file's order, their examples, scores) of a domain whose files a function writes."""
    train, test = (file(pairs, folder / name) for name, pairs in (("train", TRAIN), ("test", FIVE)))
    table = Table(train=str(train), test=str(test), validation=str(train), **options)
    data = StreamData(domains={"d": table})
    rows = sorted(table.rows("test"), key=lambda row: int(row.id.partition(":")[2]))
    tokenizer = module.backbone.tokenizer
    examples = [table.template.encode(tokenizer, domain="d", row=row, split="test") for row in rows]
    return rows, examples, evaluate(module, data, split="test", settings=EvaluationSettings())


def values(scores: Evaluation, scorer: str, rows: Sequence[Any]) -> list[float]:
    found = {score.row: score.value for score in scores if score.scorer == scorer}
    return [found[row.id] for row in rows]


def check(found: Any, golden: Sequence[Golden], plain: nn.Module, *, learnt: bool = True) -> None:
    """Tokens, mask, nll and exact match of every row, of which the model has learnt the first two."""
    rows, examples, scores = found
    expected = [(ids(prompt), [*ids(answer), 0]) for prompt, answer in golden]
    for example, (prompt, answer) in zip(examples, expected, strict=True):
        branch = example.branches[0]
        assert list(example.prompt) == prompt
        assert list(branch.tokens) == answer
        assert all(branch.mask)
    with torch.no_grad():
        per_token = [float(nll(plain, prompt, answer)) / len(answer) for prompt, answer in expected]
        assert values(scores, "nll", rows) == pytest.approx(per_token, abs=1e-5)
        limit = max(len(answer) for _, answer in expected)
        right = [greedy(plain, prompt, limit=limit) == answer[:-1] for prompt, answer in expected]
    assert values(scores, "exact_match", rows) == [float(value) for value in right]
    if learnt:
        assert right == [True, True, False, False, False], "a model that is always right or wrong proves nothing"


def writes(text: Callable[[Any], str], suffix: str) -> Callable[[Any, Path], Path]:
    def write(pairs: Any, path: Path) -> Path:
        target = path.with_suffix(f".{suffix}")
        target.write_bytes(text(pairs).encode())
        return target

    return write


@pytest.mark.parametrize("name", TEXTS)
def test_files_of_prompts(name: str, module: ContinualModule, plain: nn.Module, tmp_path: Path) -> None:
    suffix, text = TEXTS[name]
    found = scored(tmp_path, module, writes(text, suffix), scorers=["nll", "exact_match"])
    # Instructions of Natural Instructions around a question are none that the model has seen.
    check(found, [asked(*pair, name=name) for pair in FIVE], plain, learnt=name != "superni")


@pytest.mark.parametrize("name", CHATS)
def test_files_of_conversations(name: str, module: ContinualModule, plain: nn.Module, tmp_path: Path) -> None:
    suffix, text = CHATS[name]
    template = Chat(jinja=TURNS)
    found = scored(tmp_path, module, writes(text, suffix), scorers=["nll", "exact_match"], template=template)
    check(found, [talked(*pair) for pair in FIVE], plain)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_typed_tables(suffix: str, module: ContinualModule, plain: nn.Module, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def write(pairs: Any, path: Path) -> Path:
        table = pa.table({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
        target = path.with_suffix(f".{suffix}")
        if suffix == "parquet":
            parquet.write_table(table, target)
            return target
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return target

    check(scored(tmp_path, module, write, scorers=["nll", "exact_match"]), [asked(*pair) for pair in FIVE], plain)


@pytest.mark.parametrize("turns", [False, True])
def test_pairs(turns: bool, module: ContinualModule, plain: nn.Module, tmp_path: Path) -> None:
    """The chosen answer is scored, and preferred where it is likelier than the rejected one."""

    def text(pairs: Any) -> str:
        if not turns:
            return lines([{"prompt": p, "chosen": c, "rejected": "no"} for p, c in pairs])
        return lines(
            [{"prompt": said(p, c)[:1], "chosen": said(p, c)[1:], "rejected": said(p, "no")[1:]} for p, c in pairs]
        )

    template = {"template": Chat(jinja=TURNS)} if turns else {}
    wanted = ["nll", "exact_match", "preference_accuracy"]
    found = scored(tmp_path, module, writes(text, "jsonl"), scorers=wanted, **template)
    form = talked if turns else asked
    check(found, [form(*pair) for pair in FIVE], plain)
    rows, examples, scores = found
    other = [form(p, "no") for p, _ in FIVE]
    assert [list(e.branches[1].tokens) for e in examples] == [[*ids(answer), 0] for _, answer in other]
    with torch.no_grad():
        margins = [
            [float(nll(plain, ids(prompt), [*ids(answer), 0])) for prompt, answer in (form(*pair), rejected)]
            for pair, rejected in zip(FIVE, other, strict=True)
        ]
    assert values(scores, "preference_accuracy", rows) == [float(chosen < rejected) for chosen, rejected in margins]


def test_labels_of_a_folder_of_o_lora(module: ContinualModule, plain: nn.Module, tmp_path: Path) -> None:
    """The instruction of its task, and the likelier of its labels."""
    folder = tmp_path / "SC" / "toy"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["Good", "Bad"]')
    for split in ("train", "test"):
        rows = [{"sentence": f"{split} {k}", "label": ["Good", "Bad"][k % 2]} for k in range(8)]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    table = Table(path=str(folder), scorers=["nll", "accuracy"])
    scores = evaluate(module, StreamData(domains={"d": table}), split="test", settings=EvaluationSettings())
    found = sorted(table.rows("test"), key=lambda row: row.prompt)
    assert [row.completion for row in found] == ["Good", "Bad"] * 4
    prompts = [ids(f"{INSTRUCTION}test {k}\nAnswer:\n") for k in range(8)]
    with torch.no_grad():
        label = {name: [float(nll(plain, p, [*ids(f" {name}"), 0])) for p in prompts] for name in ("Good", "Bad")}
    own = [label[row.completion][k] for k, row in enumerate(found)]
    other = [label[{"Good": "Bad", "Bad": "Good"}[row.completion]][k] for k, row in enumerate(found)]
    lengths = [len(ids(f" {row.completion}")) + 1 for row in found]
    assert values(scores, "nll", found) == pytest.approx([a / n for a, n in zip(own, lengths, strict=True)], abs=1e-5)
    assert values(scores, "accuracy", found) == [float(a < b) for a, b in zip(own, other, strict=True)]


def test_texts_and_prompts_alone(module: ContinualModule, plain: nn.Module, tmp_path: Path) -> None:
    """A text follows the end token of the one before; a prompt alone has no score of its own."""
    write = writes(lambda pairs: lines([{"text": p} for p, _ in pairs]), "jsonl")
    rows, examples, scores = scored(tmp_path, module, write, scorers=["nll"])
    assert [list(e.prompt) for e in examples] == [[0]] * 5
    assert [list(e.branches[0].tokens) for e in examples] == [[*ids(p), 0] for p, _ in FIVE]
    with torch.no_grad():
        expected = [float(nll(plain, [0], [*ids(p), 0])) / (len(ids(p)) + 1) for p, _ in FIVE]
    assert values(scores, "nll", rows) == pytest.approx(expected, abs=1e-5)
    ask = writes(lambda pairs: lines([{"prompt": p, "gold": c} for p, c in pairs]), "jsonl")
    rows, examples, scores = scored(tmp_path, module, ask)
    assert [list(e.prompt) for e in examples] == [ids(f"{p}\n") for p, _ in FIVE]
    assert not any(e.branches for e in examples)
    assert scores == []
