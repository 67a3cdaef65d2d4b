"""SDFT: what is accepted, what the data set becomes, who writes it, and that it is written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Full
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.core.types import Example, Kind, Stage
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import completion_nll
from residency.mitigations import SDFT, Replay
from residency.mitigations.distillation.prompting import fill, without_end
from residency.mitigations.distillation.sdft import accepted, label_in
from residency.testing.tiny_runs import domains, make_module, train
from support.stop_and_resume import goes_on_exactly, history
from table import ADAPTERS

TEMPLATE = "{prompt}={reference}:"
END = 0


# --- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("The heart pumps blood.", True),
        ("", False),
        (" \n ", False),
        ("Based on the Reference  Answer, it pumps.", False),
        ("Your response should be short.", False),
        ("In my response I say so.", False),
        ("Now it's your turn: write.", False),
        ("Your turn! Say it.", False),
        ("It is your turn of the road.", True),
    ],
)
def test_talk_about_the_task_is_refused(text: str, good: bool) -> None:
    assert accepted(text, "It pumps.") == good


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("heart", "heart"),
        ("The answer is HEART.", "heart"),
        ("heart failure", "heart failure"),
        ("It is heart  failure, of course", "heart failure"),
        ("hearty", None),
        ("heart or lung", None),
        ("heart failure, thus the heart", None),
        ("heart, heart and heart", "heart"),
        ("c++ (fast)", "c++"),
        ("kidney", None),
    ],
)
def test_the_label_that_a_text_names(text: str, label: str | None) -> None:
    labels = ["lung", "heart", "heart failure", "c++"]
    assert label_in(text, labels) == label
    assert label_in(text, labels[::-1]) == label
    for reference in labels:
        assert accepted(text, f" {reference}", labels=labels) == (label == reference)


# --- the texts -------------------------------------------------------------------------------------------------------


def test_filling_a_template_keeps_the_tokens(llama: Path) -> None:
    tokenizer = make_module(llama, Full(), {}).backbone.tokenizer
    parts = {"prompt": (200, 7, 200), "reference": (9,)}
    assert fill(tokenizer, "{prompt}", parts) == (200, 7, 200)
    a, b = (tokenizer(text).input_ids for text in ("a{x} ", "b"))
    assert fill(tokenizer, "a{x} {reference}b{prompt}", parts) == (*a, 9, *b, 200, 7, 200)
    tokenizer.bos_token = "a"
    start = tokenizer.bos_token_id
    moved = fill(tokenizer, "b{prompt}", {"prompt": (start, 200, start)})
    assert moved == (start, *b, 200, start), "a text begins once, at its beginning"
    assert without_end((1, 2, 0), 0) == (1, 2)
    assert without_end((1, 2), 0) == (1, 2)
    assert without_end((), 0) == ()


# --- the data set ----------------------------------------------------------------------------------------------------


def stage(index: int = 0, *, kind: Kind = "generative", seed: int = 0) -> Stage:
    return Stage(index=index, domain="x", stages=2, seed=seed, steps=2, batch_size=4, kind=kind)


def build(backbone: Path, mitigation: SDFT, name: str = "lora") -> ContinualModule:
    module = make_module(backbone, ADAPTERS[name].make(), {"sdft": mitigation})
    module.build(seed=0)
    return module


def encode(module: ContinualModule, text: str) -> list[int]:
    ids: list[int] = module.backbone.tokenizer(text).input_ids
    return ids


def rows(module: ContinualModule, completions: Sequence[str], domain: str = "x") -> list[Example]:
    return [
        Example.of(
            domain=domain, row=str(i), prompt=tuple(encode(module, f"q{i}>")), completion=(*encode(module, text), END)
        )
        for i, text in enumerate(completions)
    ]


def scripted(module: ContinualModule, texts: Mapping[str, str], asked: list[str]) -> Callable[..., list[list[int]]]:
    """A `generate` that writes a text by the question in the prompt; too long a text is cut off."""

    def generate(model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **_: Any) -> list[list[int]]:
        assert not model.training
        written = []
        for ids in prompts:
            prompt = module.backbone.tokenizer.decode(ids)
            asked.append(prompt)
            written.append(encode(module, texts[prompt[:2]])[:max_new_tokens])
        return written

    return generate


def test_only_accepted_rewrites_replace_their_rows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Length and order are kept; what is refused is the very same object; the blanks of the template stay."""
    mitigation = SDFT(template=TEMPLATE, max_new_tokens=20)
    module = build(llama, mitigation)
    own = rows(module, [" yes sir", " no sir", " maybe", "fine\n", " ok"])
    old = rows(module, [" old"], domain="y")
    texts = {"q0": " indeed ", "q1": "my response is no", "q2": "so long that it never ends", "q3": "good", "q4": ""}
    asked: list[str] = []
    monkeypatch.setattr(module.backbone, "generate", scripted(module, texts, asked))
    module.model.train()
    dataset = [own[3], old[0], own[0], own[1], own[2], own[4], own[0], own[3]]
    module.begin_stage(stage(), dataset)
    assert module.model.training
    assert sorted(asked) == ["q0>= yes sir:", "q1>= no sir:", "q2>= maybe:", "q3>=fine\n:", "q4>= ok:"]
    found = list(module.dataset)
    assert [(e.domain, e.row, e.prompt) for e in found] == [(e.domain, e.row, e.prompt) for e in dataset]
    kept = {"0": " indeed", "3": "good\n"}
    for before, after in zip(dataset, found, strict=True):
        if before.domain == "x" and before.row in kept:
            assert after.completion == (*encode(module, kept[before.row]), END)
        else:
            assert after is before
    assert mitigation.metrics_to_log(module) == {"accepted": 2 / 5}


def test_labels_must_be_the_same(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mitigation = SDFT(template=TEMPLATE, max_new_tokens=60)
    module = build(llama, mitigation)
    own = rows(module, [" heart", " lung", " heart"])
    texts = {"q0": "clearly the Heart", "q1": "it is the heart", "q2": "some organ"}
    monkeypatch.setattr(module.backbone, "generate", scripted(module, texts, []))
    module.begin_stage(stage(kind="label"), own)
    assert module.dataset[0].completion == (*encode(module, " clearly the Heart"), END)
    assert module.dataset[1] is own[1]
    assert module.dataset[2] is own[2]
    module.begin_stage(stage(), own)
    assert module.dataset[1] is not own[1], "free text cannot be checked"


def test_the_longest_completion_is_the_default_limit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mitigation = SDFT(template=TEMPLATE)
    module = build(llama, mitigation)
    own = rows(module, [" yes", " certainly"])
    monkeypatch.setattr(module.backbone, "generate", scripted(module, {"q0": "1234567890", "q1": "12345678901"}, []))
    module.begin_stage(stage(), own)
    assert module.dataset[0].completion == (*encode(module, " 1234567890"), END)
    assert module.dataset[1] is own[1], "as long as the limit: it did not come to an end"


def test_a_share_of_the_rows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by seed, domain and row alone; another seed, other rows; 0 = the data set itself."""
    chosen = {}
    for seed in (0, 1):
        for share in (0.0, 0.5, 1.0):
            mitigation = SDFT(template=TEMPLATE, share=share)
            module = build(llama, mitigation)
            own = rows(module, [" yes"] * 10)
            asked: list[str] = []
            texts = {f"q{i}": "no" for i in range(10)}
            monkeypatch.setattr(module.backbone, "generate", scripted(module, texts, asked))
            module.begin_stage(stage(seed=seed), own)
            chosen[seed, share] = {prompt[1] for prompt in asked}
            assert {e.row for e, o in zip(module.dataset, own, strict=True) if e is not o} == chosen[seed, share]
            assert (module.dataset is own) == (share == 0)
    assert chosen[0, 0.0] == set()
    assert 0 < len(chosen[0, 0.5]) < 10
    assert len(chosen[0, 1.0]) == 10
    assert chosen[0, 0.5] != chosen[1, 0.5]


def test_a_stored_stage_is_not_written_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is in the state, which is there before the objective looks at the rows."""
    module = build(llama, SDFT(template=TEMPLATE))
    own = rows(module, [" yes", " no"])
    monkeypatch.setattr(module.backbone, "generate", scripted(module, {"q0": "si", "q1": "nix"}, []))
    module.begin_stage(stage(), own)
    written, state = list(module.dataset), module.mitigations["sdft"].state_dict()
    later = build(llama, SDFT(template=TEMPLATE))
    monkeypatch.setattr(later.backbone, "generate", None)
    later.begin_stage(stage(), own, stored={"sdft": state})
    assert list(later.dataset) == written != own


def test_who_writes(llama: Path) -> None:
    """`base` is the pretrained model, `current` the model as it is; neither is changed."""
    written = {}
    for rewriter in ("base", "current"):
        mitigation = SDFT(template=TEMPLATE, rewriter=rewriter, max_new_tokens=40, temperature=1.0)  # type: ignore[arg-type]
        module = build(llama, mitigation)
        own = rows(module, [" yes", " no", " maybe"] * 8)
        for moved in (0.0, 0.3):
            with torch.no_grad():
                for leaf in module.adapter.trainable(module.model).values():
                    leaf += moved
            before = snapshot(module.adapter.state(module.model))
            state = torch.get_rng_state()
            module.begin_stage(stage(), own)
            written[rewriter, moved] = [e.completion for e in module.dataset]
            assert all(torch.equal(t, before[n]) for n, t in module.adapter.state(module.model).items())
            assert torch.equal(torch.get_rng_state(), state)
    first = written["base", 0.0]
    assert first != [e.completion for e in own], "nothing was accepted, so this test shows nothing"
    assert written["base", 0.3] == first == written["current", 0.0]
    assert written["current", 0.3] != first
    with pytest.raises(UserError, match=r"needs reference(.|\n)*rewriter: current"):
        make_module(llama, Full(), {"sdft": SDFT(rewriter="base")})


def test_the_models_own_words_are_nearer_to_it(llama: Path, tmp_path: Path) -> None:
    """The reason for the method: under the model before the stage, the kept targets are likelier than the originals."""
    _, module = train(tmp_path / "run", llama, Full(), {}, steps=40, kinds={"a": "generative"})
    data = StreamData(domains=domains(tmp_path / "data", {"c": "generative"}), batch_size=4)
    where = Stage(index=1, domain="c", stages=2, seed=0, steps=6, batch_size=4)
    mitigation = SDFT(template="{reference}{prompt}", max_new_tokens=12)
    examples = list(data.examples(where, module.backbone.tokenizer))
    mitigation.prepare_dataset(module, examples, where)
    kept = list(mitigation.transform_dataset(examples, where))
    changed = [(o, k) for o, k in zip(examples, kept, strict=True) if o is not k]
    assert len(changed) >= 5
    before, after = (completion_nll(module, [pair[i] for pair in changed]).mean() for i in (0, 1))
    assert after < before - 0.5


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_writes_nothing_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    original = SDFT.prepare_dataset

    def counted(self: SDFT, module: Any, dataset: Any, stage: Stage) -> None:
        prepared.append(stage.index)
        original(self, module, dataset, stage)

    monkeypatch.setattr(SDFT, "prepare_dataset", counted)
    lines = goes_on_exactly(
        tmp_path,
        llama,
        ADAPTERS["lora"].make,
        lambda: {
            "replay": Replay(ratio=0.25, capacity=8),
            "sdft": SDFT(template=TEMPLATE, max_new_tokens=96, temperature=1.0),
        },
        kinds={"a": "generative", "c": "generative"},
    )
    assert prepared == [0, 1, 0, 1], "the run that goes on has the rewrites of its stage already"
    assert all(0 < line["sdft/accepted"] < 1 for line in lines)
    assert len({line["sdft/accepted"] for line in history(tmp_path / "whole")}) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"share": -0.1},
        {"share": 1.1},
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"generation_batch": 0},
        {"template": "{prompt}"},
        {"template": "{reference}"},
    ],
)
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="SDFT with"):
        SDFT(**options)


def test_share_zero_takes_part_in_nothing() -> None:
    assert not SDFT(share=0.0).touches_training(0)
    assert SDFT().touches_training(0), "the first domain is rewritten by the pretrained model"
