"""Rows that models write: what is asked of them, what is kept, and that every process reads the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from residency.backbones import CausalLM
from residency.backbones.pretrained import Pretrained
from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains.augmentation import BackTranslation, Paraphrase, SelfInstruct
from residency.domains.augmentation.base import Asked, Attempt, Augmentation, Material
from residency.domains.augmentation.children import make_children, plan
from residency.domains.augmentation.written import attempts_key, written
from residency.domains.template import Template
from residency.testing.scripted_model import ScriptedModel
from residency.testing.tiny_models import write_tokenizer
from support.translators import write_translator

PROMPTS = ["How many 3 legged stools fit here?", "Which river crosses the town?", "Who wrote the old hymn?"]
ROWS = tuple(Row(id=str(i), prompt=p, completion=f"answer {i}") for i, p in enumerate(PROMPTS))
TEMPLATE = Template(max_tokens=256, tokenise="apart")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/augmented"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def attempts(
    method: Augmentation, base: ScriptedModel | None, rows: tuple[Row, ...] = ROWS, labels: Any = ()
) -> list[Attempt]:
    material = Material(rows=rows, labels=labels, template=TEMPLATE, base=base)
    return list(method.attempts(plan(rows, len(rows) * method.per_row), material))


def test_a_paraphrase_keeps_its_answer_likely(tokenizer: Any) -> None:
    """The answer is read after the new prompt and after the old one: at most 1.2 times the nats."""
    new = {
        PROMPTS[0]: "How many stools with 3 legs fit here?",
        PROMPTS[1]: "Which river flows across the town?",
        PROMPTS[2]: None,
    }
    nats = {PROMPTS[0]: 10.0, new[PROMPTS[0]]: 12.0, PROMPTS[1]: 10.0, new[PROMPTS[1]]: 12.5}
    base = ScriptedModel(
        tokenizer,
        answer=lambda request, seed: new[request.rpartition("\n\n")[2]],
        nll=lambda prompt, branch: nats[prompt.strip()],
    )
    found = attempts(Paraphrase(), base)
    assert [one.dropped for one in found] == ["", "answer", "unfinished"]
    assert [one.score for one in found] == [pytest.approx(1.2), pytest.approx(1.25), None]
    assert found[0].prompt == new[PROMPTS[0]]
    assert found[0].completion is None
    assert len({seed for _, _, seed in base.asked}) == 3


def test_filters_of_rewordings_come_before_the_answer(tokenizer: Any) -> None:
    base = ScriptedModel(tokenizer, answer=lambda request, seed: "How many stools with 4 legs fit here?")
    assert [one.dropped for one in attempts(Paraphrase(), base)] == ["numbers", "numbers", "numbers"]


def test_self_instruct_shows_three_rows_and_answers_itself(tokenizer: Any) -> None:
    def answer(request: str, seed: int) -> str:
        return "Where do swallows sleep in winter?" if request.startswith("Here are three") else "in reeds"

    base = ScriptedModel(tokenizer, answer=answer)
    found = attempts(SelfInstruct(), base)
    assert [(one.prompt, one.completion, one.dropped) for one in found] == [
        (answer("Here are three", 0), "in reeds", "")
    ] * 3
    for one, (request, _, _), row in zip(found, base.asked[::2], ROWS, strict=True):
        assert one.more["seeds"][0] == row.id
        assert sorted(one.more["seeds"]) == ["0", "1", "2"]
        assert all(f"{k + 1}. {ROWS[int(i)].prompt}" in request for k, i in enumerate(one.more["seeds"]))
    children, _ = make_children([SelfInstruct()], Material(rows=ROWS, template=TEMPLATE, base=base), [], max_share=0.5,
                                write=lambda m, a, x: written(m, a, x))  # fmt: skip
    assert len(children) == 1, "equal prompts are one row"


def test_self_instruct_takes_the_label_that_the_model_is_sure_of(tokenizer: Any) -> None:
    rows = tuple(Row(id=str(i), prompt=p, completion="ab"[i % 2], kind="labelled") for i, p in enumerate(PROMPTS))
    for nats, label in (({"a": 1.0, "b": 2.5}, "a"), ({"a": 4.0, "b": 2.5}, "b"), ({"a": 2.0, "b": 2.5}, "")):
        base = ScriptedModel(
            tokenizer,
            answer=lambda request, seed: "Where do swallows sleep in winter?",
            nll=lambda prompt, branch, nats=nats: nats[branch.strip()[0]],
        )
        found = attempts(SelfInstruct(), base, rows, ("a", "b"))
        assert [one.completion for one in found] == [label] * 3
        assert {one.dropped for one in found} == {"" if label else "label"}
        assert len(base.asked) == 3, "labels are read, not written"


def test_self_instruct_needs_three_rows(tokenizer: Any) -> None:
    base = ScriptedModel(tokenizer, answer=lambda request, seed: "x")
    with pytest.raises(UserError, match="2 training rows"):
        SelfInstruct().check(Material(rows=ROWS[:2], template=TEMPLATE, base=base))


@pytest.mark.parametrize("kind", [Paraphrase, SelfInstruct])
def test_without_a_model_it_is_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="without a model"):
        kind().check(Material(rows=ROWS, template=TEMPLATE))
    with pytest.raises(UserError, match="temperature"):
        kind(temperature=0)


class Counted(Augmentation):
    """Counts how often it writes."""

    name = "counted"
    needs_base = kept_in_cache = True
    made = 0

    def attempts(self, asked: Any, material: Material) -> Iterator[Attempt]:
        type(self).made += 1
        for one in asked:
            yield Attempt(prompt=material.base.write(one.parent.prompt, max_new_tokens=1, temperature=1, seed=0) or "")  # type: ignore[union-attr]

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed}


def test_what_is_written_is_written_once(tokenizer: Any, cache: Path) -> None:
    """A model that would write something else the second time changes nothing; another model, row or option does."""
    asked = [Asked(parent=row, number=1) for row in ROWS]

    def given(name: str = "scripted", rows: tuple[Row, ...] = ROWS) -> Material:
        text = f"text {Counted.made}"
        return Material(
            rows=rows, template=TEMPLATE, base=ScriptedModel(tokenizer, answer=lambda r, s: text, name=name)
        )

    Counted.made = 0
    first = written(Counted(), asked, given())
    again = written(Counted(), asked, given())
    assert first == again
    assert Counted.made == 1
    assert first.tokens == 30
    keys = {
        attempts_key(Counted(), asked, given()),
        attempts_key(Counted(seed=1), asked, given()),
        attempts_key(Counted(), asked, given("other")),
        attempts_key(Counted(), asked[:2], given()),
        attempts_key(Counted(), asked, given(rows=(*ROWS, Row(id="new", prompt="p", completion="c")))),
    }
    assert len(keys) == 5
    # One that is damaged, or of another shape, is made again.
    (file,) = cache.glob("*.json")
    for damage in ("{}", file.read_text()[:-40], file.read_text().replace("text 0", "text 7")):
        file.write_text(damage)
        assert written(Counted(), asked, given()).attempts[0].prompt == f"text {Counted.made - 1}"
    assert Counted.made == 4


def test_two_writers_at_once_write_once(tokenizer: Any) -> None:
    Counted.made = 0
    asked = [Asked(parent=row, number=1) for row in ROWS]
    material = Material(rows=ROWS, template=TEMPLATE, base=ScriptedModel(tokenizer, answer=lambda r, s: "x"))
    with ThreadPoolExecutor(2) as pool:
        found = [job.result() for job in [pool.submit(written, Counted(), asked, material) for _ in range(2)]]
    assert found[0] == found[1]
    assert Counted.made == 1


def test_the_pretrained_model_writes_and_reads(llama: Path) -> None:
    """Draws depend on the request and its seed; likelihoods are those of transformers; the memory is given back."""
    import torch

    backbone = CausalLM(path=str(llama))
    base = Pretrained(backbone=backbone)
    options: Any = {"max_new_tokens": 8, "temperature": 0.7}
    texts = [base.write("a b c", seed=seed, **options) for seed in (1, 2, 1)]
    assert texts[0] == texts[2]
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        base.write("a b c", seed=3, **options)
        assert torch.equal(state, torch.random.get_rng_state())
    example = TEMPLATE.encode(
        base.tokenizer, domain="d", row=Row(id="1", prompt="what", completion="that"), labels=["that", "other"]
    )
    model = backbone.load().eval()
    for branch, nll in zip(example.branches, base.nll(example), strict=True):
        ids = torch.tensor([[*example.prompt, *branch.tokens]])
        logits = model(ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
        plain = -logits[torch.arange(len(branch.tokens)), torch.tensor(branch.tokens)].sum()
        assert nll == pytest.approx(float(plain.detach()), abs=1e-4)
    assert base.tokens > 0
    base.release()
    assert backbone.work.take() == (0, 0)


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_translator(tmp_path_factory.mktemp("translator") / "t5")


def test_translation_there_and_back(translator: Path) -> None:
    """Two random models translate nothing that passes: all is dropped, by the same filters in every process."""
    method, again = (BackTranslation(forward=str(translator), backward=str(translator), beams=2) for _ in range(2))
    found = attempts(method, None)
    assert len(found) == len(ROWS)
    assert {one.dropped for one in found} <= {"unfinished", "empty", "script", "numbers", "length", "too_far"}
    assert method.tokens > 0
    assert [one.prompt for one in attempts(again, None)] == [one.prompt for one in found]


def test_a_translation_is_that_of_transformers(translator: Path) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    method = BackTranslation(forward=str(translator), backward=str(translator), forward_prefix="translate: ", beams=2)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(translator),
        AutoModelForSeq2SeqLM.from_pretrained(translator).eval(),
    )
    read = tokenizer("translate: " + PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        (plain,) = model.generate(
            **read, num_beams=2, do_sample=False, max_new_tokens=2 * read["input_ids"].shape[1] + 16
        )
    ours = method.forward.translate(PROMPTS[0], beams=2, temperature=1.0, seed=0)
    ended = model.generation_config.eos_token_id in plain.tolist()
    assert ours == (tokenizer.decode(plain, skip_special_tokens=True).strip() if ended else None)


@pytest.mark.parametrize(
    "options", [{"forward": "nowhere"}, {"beams": -1}, {"per_row": 2}, {"beams": 0, "temperature": 0}]
)
def test_a_translation_that_cannot_be_made_is_refused(options: dict[str, Any], t5: Path) -> None:
    with pytest.raises(UserError):
        BackTranslation(**{"forward": str(t5), "backward": str(t5), **options})


def test_a_folder_without_such_a_model_is_refused(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "llama"}))
    for folder in (tmp_path / "m", llama):
        method = BackTranslation(forward=str(folder), backward=str(folder))
        with pytest.raises(UserError, match="forward"):
            attempts(method, None)
