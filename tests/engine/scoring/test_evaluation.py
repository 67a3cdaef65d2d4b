"""Scores: equal to brute force with the plain model, whatever the batches, and without a trace in the model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from residency.adapters import Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.backbones.base import Sampling
from residency.core.batching import make_batch
from residency.core.types import Example, Layout, Row, Split
from residency.domains.base import Domain, Kind
from residency.domains.stream_data import StreamData
from residency.domains.template import Template
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.likelihoods import branch_nll, completions_and_labels
from residency.engine.scoring.row_scores import Evaluation, RowScore, means
from residency.engine.scoring.settings import EvaluationSettings
from residency.objectives import SFT
from residency.scorers.exact import exact_match
from residency.scorers.likelihood import label_is_best
from residency.scorers.overlap import rouge_l

LABELS = ("no", "yes, of course", "maybe", "k")
PLAIN = EvaluationSettings()


class Words(Domain):
    """Random words, with labels of very different length or with short texts."""

    source, licence, attribution = "made here", "none", "nobody"

    def __init__(self, kind: Kind, **options: Any) -> None:
        self.kind = kind
        super().__init__(template=Template(prompt="{prompt}:", max_prompt_tokens=16, max_tokens=36), **options)

    def read(self) -> Mapping[Split, Sequence[Row]]:
        draw, found = random.Random(self.kind), {}
        for split, count in (("train", 4), ("test", 11)):
            prompts = [f"{split} " + "".join(draw.choices("abcdef", k=draw.randint(1, 9))) for _ in range(count)]
            texts = [LABELS[i % 4] if self.kind == "label" else prompt[-4:] for i, prompt in enumerate(prompts)]
            found[split] = [
                Row(id=f"{split}{i}", prompt=p, completion=t)
                for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
            ]
        return found


@pytest.fixture(scope="session")
def scored_data() -> StreamData:
    """A domain of labels and one of texts, and the labels again as a probe."""
    domains: dict[str, Domain] = {"labels": Words("label"), "texts": Words("generative")}
    return StreamData(domains=domains, probes={"probe": Words("label", max_test=3)})


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def scored_module(request: pytest.FixtureRequest) -> ContinualModule:
    """A module as it comes, ready to be scored."""
    backbone = CausalLM(path=str(request.getfixturevalue(request.param)))
    module = ContinualModule(backbone=backbone, adapter=Full(), objective=SFT())
    module.build(seed=0)
    return module


def plain_nll(plain: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Transformers' own loss of one sequence, times its supervised tokens."""
    labels = torch.tensor([[*[-100] * len(prompt), *completion]])
    with torch.no_grad():
        return float(plain(input_ids=torch.tensor([[*prompt, *completion]]), labels=labels).loss) * len(completion)


def values(scores: Evaluation, scorer: str, column: str) -> dict[str, float]:
    return {s.row: s.value for s in scores if (s.scorer, s.column) == (scorer, column)}


# --- scores by brute force --------------------------------------------------------------------------------------------


def test_likelihoods_by_brute_force(scored_module: ContinualModule, scored_data: StreamData) -> None:
    """nll is the loss of transformers weighted by tokens; a row is right if its own label is the likeliest of all."""
    module, tokenizer = scored_module, scored_module.backbone.tokenizer
    plain = AutoModelForCausalLM.from_pretrained(module.backbone.folder).eval()
    scores = evaluate(module, scored_data, split="test", settings=PLAIN)
    for column, domain in scored_data.columns.items():
        total = tokens = 0.0
        right = {}
        for row in domain.rows("test"):
            prompt = tokenizer(row.prompt + ":").input_ids
            answers = {text: [*tokenizer(" " + text).input_ids, 0] for text in {*LABELS, row.completion}}
            nll = {text: plain_nll(plain, prompt, ids) for text, ids in answers.items()}
            total, tokens = total + nll[row.completion], tokens + len(answers[row.completion])
            right[row.id] = float(min(nll, key=nll.__getitem__) == row.completion)
        assert means(scores)["nll"][column] == pytest.approx(total / tokens, abs=1e-5)
        if domain.kind == "label":
            assert values(scores, "accuracy", column) == right
    labels = values(scores, "accuracy", "labels").values()
    assert {*labels} == {0.0, 1.0}, "a model that is always right or always wrong proves nothing"


def greedy(model: nn.Module, prompt: Sequence[int], *, end: int, limit: int) -> list[int]:
    """The likeliest token again and again, the whole sequence read anew each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_generation_in_batches_is_greedy_one_by_one(scored_module: ContinualModule) -> None:
    """Prompts of different length, padded on the left or packed; some reach the end token, others the limit."""
    backbone, model = CausalLM(path=str(scored_module.backbone.folder)), scored_module.model
    draw = random.Random(0)
    prompts = [draw.choices(range(1, 257), k=n) for n in (1, 9, 4, 4, 15)]
    # An untrained model hardly ever ends, so that a token it does write is made the end token.
    end = greedy(model, prompts[1], end=-1, limit=3)[-1]
    backbone.tokenizer = SimpleNamespace(eos_token_id=end)
    wanted = [greedy(model, prompt, end=end, limit=12) for prompt in prompts]
    for layout in ("padded", "packed"):
        assert backbone.generate(model, prompts, max_new_tokens=12, layout=layout) == wanted
        assert backbone.generate(model, prompts[1:2], max_new_tokens=12, layout=layout) == wanted[1:2]
    assert len(wanted[1]) < 12
    assert max(map(len, wanted)) == 12


def test_sampling_is_a_function_of_its_seed(scored_module: ContinualModule) -> None:
    """The global generator is neither read nor moved; k = 1 is greedy, and so is a temperature near 0."""
    backbone, model = scored_module.backbone, scored_module.model
    prompts = [[5, 6, 7], [9], [30, 40]]

    def drawn(**options: Any) -> list[list[int]]:
        torch.manual_seed(options.pop("other", 0))
        before = torch.get_rng_state()
        how = Sampling(**{"temperature": 1.0, "seed": 3} | options)
        written = backbone.generate(model, prompts, max_new_tokens=8, sampling=how)
        assert torch.equal(before, torch.get_rng_state())
        return written

    assert drawn() == drawn(other=1)
    assert drawn() != drawn(seed=4)
    greedy_ones = backbone.generate(model, prompts, max_new_tokens=8)
    assert drawn(top_k=1) == drawn(temperature=1e-4) == greedy_ones != drawn()


def test_generated_scores_by_brute_force(scored_module: ContinualModule, scored_data: StreamData) -> None:
    """What is generated is compared with the row's text; one text is what the model writes anyway."""
    module, tokenizer = scored_module, scored_module.backbone.tokenizer

    def written(prompt: str) -> str:
        # As long as the template leaves room for after "abc:"; that text is the longest reference, hence the limit.
        room = 36 - len("abc:")
        return tokenizer.decode(greedy(module.model, tokenizer(prompt + ":").input_ids, end=0, limit=room))

    test = scored_data.domains["texts"].rows("test")
    domain = Words("generative")
    easy = Row(id="easy", prompt="abc", completion=written("abc").strip())
    domain._rows = {"train": domain.rows("train"), "validation": (), "test": (*test, easy)}
    scores = evaluate(module, StreamData(domains={"texts": domain}), split="test", settings=PLAIN)
    exact, rouge = (values(scores, scorer, "texts") for scorer in ("exact_match", "rougeL"))
    assert exact == {row.id: 0.0 for row in test} | {"easy": 1.0}
    assert rouge == pytest.approx({r.id: rouge_l([written(r.prompt)], [r.completion])[0] for r in (*test, easy)})


# --- what scores do not depend on -------------------------------------------------------------------------------------


def comparable(scores: Evaluation) -> dict[tuple[str, str, str], float]:
    return {(s.column, s.row, s.scorer): s.value for s in scores}


@pytest.mark.parametrize(
    "settings", [{"batch_tokens": 1}, {"batch_tokens": 90}, {"batch_tokens": 100_000, "generation_batch": 3}]
)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_scores_do_not_depend_on_batches(
    settings: dict[str, int],
    layout: Any,
    scored_module: ContinualModule,
    scored_data: StreamData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = comparable(evaluate(scored_module, scored_data, split="test", settings=PLAIN))
    monkeypatch.setattr(scored_module, "layout", layout)
    found = comparable(evaluate(scored_module, scored_data, split="test", settings=EvaluationSettings(**settings)))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert [*found] == [*wanted]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_labels_scored_as_a_tree_are_scored_as_if_alone(layout: Any, scored_module: ContinualModule) -> None:
    """Random labels that share beginnings, against one row per label; twice the same bits."""
    draw = random.Random(1)
    rows = []
    for name in range(6):
        prompt, *labels = (tuple(draw.choices(range(1, 4), k=draw.randint(1, 9))) for _ in range(9))
        rows.append(
            Example.of(domain="d", row=str(name), prompt=prompt, completion=labels[0], alternatives=(*labels[1:],))
        )
    flat = [e.answered(t) for e in rows for t in (e.completion, *e.alternatives)]

    def nll(examples: list[Example], kind: Layout) -> torch.Tensor:
        batch = make_batch(examples, layout=kind)
        return scored_module.backbone.target_nll(scored_module.model, batch)

    found = nll(rows, layout)
    torch.testing.assert_close(found, nll(flat, "padded"), atol=1e-5, rtol=0)
    assert torch.equal(found, nll(rows, layout))
    assert layout == "padded" or make_batch(rows, layout=layout).tokens < 0.8 * make_batch(flat, layout=layout).tokens


def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every batch of likelihoods from now on."""
    read: list[int] = []

    def count(examples: Sequence[Example], **options: Any) -> Any:
        batch = make_batch(examples, **options)
        read.append(batch.tokens)
        return batch

    monkeypatch.setattr("residency.engine.scoring.likelihoods.make_batch", count)
    return read


def test_labels_that_have_lost_are_not_read(scored_module: ContinualModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same winners as when every label is scored in full, with fewer tokens."""
    draw = random.Random(2)
    rows = []
    for name in range(60):
        # Short completions, so that even under a model that knows nothing many labels lose by their first token.
        lengths = [(1, 1, 4)[name % 3], *(1 + 3 * ((k + name) % 4) for k in range(4))]
        labels = [tuple(draw.choices(range(1, 257), k=length)) for length in lengths]
        prompt = tuple(draw.choices(range(1, 257), k=draw.choice((2, 40))))
        first, *others = labels
        rows.append(Example.of(domain="d", row=str(name), prompt=prompt, completion=first, alternatives=tuple(others)))
    read = tokens_read(monkeypatch)
    whole = branch_nll(scored_module, rows, batch_tokens=1024)
    tokens = sum(read)
    read.clear()
    found = completions_and_labels(scored_module, rows, batch_tokens=1024)
    assert sum(read) < tokens
    assert {row: best for row, (_, best) in found.items()} == {row: label_is_best(nll) for row, nll in whole.items()}
    assert {best for _, best in found.values()} == {True, False}
    assert [nll for nll, _ in found.values()] == pytest.approx([float(whole[e.row][0]) for e in rows], abs=1e-5)


def test_one_label_that_has_won_is_proof_enough(
    scored_module: ContinualModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that all rows share: the same winners as when every label is read, with far fewer tokens."""
    draw = random.Random(3)
    labels = [tuple(draw.choices(range(1, 257), k=9)) for _ in range(22)]
    rows = []
    for name in range(30):
        own = draw.randrange(22) if name else None
        prompt = tuple(draw.choices(range(1, 257), k=10))
        completion = (7,) if own is None else labels[own]
        others = tuple(label for k, label in enumerate(labels) if k != own)
        rows.append(Example.of(domain="d", row=str(name), prompt=prompt, completion=completion, alternatives=others))
    read = tokens_read(monkeypatch)
    whole = branch_nll(scored_module, rows, batch_tokens=1024)
    tokens = sum(read)
    read.clear()
    found = completions_and_labels(scored_module, rows, batch_tokens=1024)
    assert sum(read) < 0.45 * tokens
    assert {row: best for row, (_, best) in found.items()} == {row: label_is_best(nll) for row, nll in whole.items()}
    assert found["0"][1], "one token loses to no nine tokens"
    alone = {e.row: completions_and_labels(scored_module, [e], batch_tokens=1024)[e.row][1] for e in rows}
    assert alone == {row: best for row, (_, best) in found.items()}, "whatever other rows are there"


@pytest.mark.parametrize("threshold", [0, 10**9])
def test_scores_do_not_depend_on_merging(
    threshold: int, llama: Path, scored_data: StreamData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded into the weights or beside them: scores are equal, and the weights are bit for bit what they were."""
    module = ContinualModule(
        backbone=CausalLM(path=str(llama)), adapter=lora(target_modules="all-linear", r=2), objective=SFT()
    )
    module.build(seed=0)
    torch.manual_seed(0)
    for leaf in module.adapter.trainable(module.model).values():
        leaf.data.normal_(std=0.3)
    before = digest(module)
    monkeypatch.setattr("residency.engine.scoring.evaluation.MERGE_FROM_TOKENS", 10**9)
    wanted = comparable(evaluate(module, scored_data, split="test", settings=PLAIN))
    monkeypatch.setattr("residency.engine.scoring.evaluation.MERGE_FROM_TOKENS", threshold)
    found = comparable(evaluate(module, scored_data, split="test", settings=PLAIN))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert (found == wanted) == (threshold > 0), "merging must have taken place, and rounding shows that it has"
    assert digest(module) == before
    one = comparable(evaluate(module, scored_data, split="test", settings=PLAIN, columns=["texts"]))
    assert one == {key: value for key, value in found.items() if key[0] == "texts"}, "whatever else is scored beside"


def test_folding_once_for_columns_that_are_large(
    llama: Path, scored_data: StreamData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small column between large ones is scored as if it were alone, the large ones share one folding."""
    module = ContinualModule(
        backbone=CausalLM(path=str(llama)), adapter=lora(target_modules="all-linear", r=2), objective=SFT()
    )
    module.build(seed=0)
    for leaf in module.adapter.trainable(module.model).values():
        leaf.data.normal_(std=0.3)
    sizes = {
        name: sum(map(len, scored_data.evaluation_examples(name, "test", module.backbone.tokenizer)))
        for name in scored_data.columns
    }
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    monkeypatch.setattr("residency.engine.scoring.evaluation.MERGE_FROM_TOKENS", sizes[small] + 1)
    foldings = []
    fold = type(module.adapter).folded_for_scoring
    monkeypatch.setattr(
        type(module.adapter), "folded_for_scoring", lambda self, model: foldings.append(model) or fold(self, model)
    )

    def scores(*columns: str) -> dict[Any, float]:
        foldings.clear()
        return comparable(evaluate(module, scored_data, split="test", settings=PLAIN, columns=columns))

    alone = scores(small) | scores(large)
    assert scores(large, large) == scores(large)
    assert scores(small, large) == alone
    assert scores(large, small) == alone
    assert [len(foldings) for names in ((large, large), (large, small, large), (small,)) if scores(*names)] == [1, 2, 0]


# --- nothing changes --------------------------------------------------------------------------------------------------


def digest(module: ContinualModule) -> str:
    state = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        state.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(training: bool, llama_dropout: Path, scored_data: StreamData) -> None:
    """Weights, mode, random state, gradients and what requires them; and dropout is off while scoring."""
    module = ContinualModule(
        backbone=CausalLM(path=str(llama_dropout)),
        adapter=lora(target_modules=["q_proj"], r=2, lora_dropout=0.5),
        objective=SFT(),
    )
    module.build(seed=0)
    module.model.train(training)
    leaves = [*module.adapter.trainable(module.model).values()]
    for leaf in leaves:
        leaf.data.normal_()
    leaves[0].grad = torch.ones_like(leaves[0])

    def facts() -> Any:
        flags = [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()]
        return digest(module), flags, [m.training for m in module.model.modules()], torch.get_rng_state().tolist()

    def draw(column: str, rows: int) -> None:
        torch.rand(rows)

    before = facts()
    scores = comparable(evaluate(module, scored_data, split="test", settings=PLAIN, advance=draw))
    assert facts() == before
    assert torch.equal(leaves[0].grad, torch.ones_like(leaves[0]))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    module.model.eval()
    assert scores == comparable(evaluate(module, scored_data, split="test", settings=PLAIN))


def test_a_failed_evaluation_leaves_the_mode_too(
    scored_module: ContinualModule, scored_data: StreamData, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_module.model.train()

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scored_module.backbone, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(scored_module, scored_data, split="test", settings=PLAIN)
    assert scored_module.model.training
    scored_module.model.eval()


# --- which rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracy_rows", "generation_rows"), [(None, None), (3, 2), (0, 0), (100, 100)])
def test_limits_of_the_costly_scores(
    accuracy_rows: int | None, generation_rows: int | None, scored_module: ContinualModule, scored_data: StreamData
) -> None:
    """The first rows of each column compete or are generated; the likelihood is that of every row."""
    settings = EvaluationSettings(accuracy_rows=accuracy_rows, generation_rows=generation_rows)
    scores = evaluate(scored_module, scored_data, split="test", settings=settings)
    whole = comparable(evaluate(scored_module, scored_data, split="test", settings=PLAIN))
    assert comparable(scores) == pytest.approx({k: whole[k] for k in comparable(scores)}, abs=1e-5)
    for column, domain in scored_data.columns.items():
        ids = [row.id for row in domain.rows("test")]
        assert [*values(scores, "nll", column)] == ids
        assert [*values(scores, "accuracy", column)] == (ids[:accuracy_rows] if domain.kind == "label" else [])
        for scorer in ("exact_match", "rougeL"):
            assert [*values(scores, scorer, column)] == (ids[:generation_rows] if domain.kind == "generative" else [])


def test_rows_are_tokenised_once(scored_module: ContinualModule) -> None:
    """However many states are scored; anew for another tokenizer, split or number of competing rows."""
    tokenizer, calls = scored_module.backbone.tokenizer, []

    class Counting:
        eos_token_id, bos_token_id = 0, None

        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(text)
            return tokenizer(text, **options)

    data, counting = StreamData(domains={"labels": Words("label")}), Counting()
    first = data.evaluation_examples("labels", "test", counting, competing=2)
    count = len(calls)
    first.clear()
    again = data.evaluation_examples("labels", "test", counting, competing=2)
    assert len(calls) == count
    assert again == data.evaluation_examples("labels", "test", tokenizer, competing=2)
    assert [bool(e.alternatives) for e in again] == [True] * 2 + [False] * 9
    for split, competing in (("train", 2), ("test", 3)):
        count = len(calls)
        data.evaluation_examples("labels", split, counting, competing=competing)
        assert len(calls) > count


def test_columns_splits_and_progress(scored_module: ContinualModule, scored_data: StreamData) -> None:
    done: dict[str, int] = {}

    def advance(column: str, rows: int) -> None:
        done[column] = done.get(column, 0) + rows

    options: dict[str, Any] = {"settings": EvaluationSettings(batch_tokens=60), "advance": advance}
    scores = evaluate(scored_module, scored_data, split="train", columns=["probe", "texts"], **options)
    assert {s.column for s in scores} == {"probe", "texts"}
    assert {s.row for s in scores} == {f"train{i}" for i in range(4)}
    assert done == {"probe": 4, "texts": 4}
    assert all(s.tokens == len(LABELS[int(s.row[-1])]) + 2 for s in scores if s.column == "probe")


def test_means_weigh_likelihoods_by_tokens_and_the_rest_by_rows() -> None:
    rows = [("nll", 1.0, 3, 3), ("nll", 5.0, 1, 1), ("accuracy", 1.0, 3, 1), ("accuracy", 0.0, 1, 1)]
    scores = [RowScore("c", str(i), *row) for i, row in enumerate(rows)]
    assert means(scores) == {"nll": {"c": 2.0}, "accuracy": {"c": 0.5}}
    assert means([]) == {}


# --- scorers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "target", "value"),
    [
        ("4", "4", 1),
        (" 4\n", "4", 1),
        ("New  York", "New York", 1),
        ("42", "4", 0),
        ("4", "42", 0),
        ("", "4", 0),
        ("the answer is 4", "4", 0),
        ("4", "the answer is 4", 0),
        ("Paris", "paris", 0),
        ("NewYork", "New York", 0),
    ],
)
def test_exact_match_takes_no_part_for_the_whole(prediction: str, target: str, value: float) -> None:
    assert exact_match(prediction, target) == value


def test_rouge_l_by_hand() -> None:
    """F1 of the longest common subsequence: 5 of 6 and 6 words; 2 of 4 and 2; none; all."""
    predictions = ["the cat is on the mat", "a b c d", "x", "one two", ""]
    targets = ["the cat sat on the mat", "a c", "y", "one two", "y"]
    assert rouge_l(predictions, targets) == pytest.approx([5 / 6, 2 / 3, 0, 1, 0], abs=1e-6)
    assert rouge_l([], []) == []


@pytest.mark.parametrize(
    ("nll", "best"),
    [([1.0, 2.0, 3.0], True), ([2.0, 1.0, 3.0], False), ([1.0, 1.0], False), ([float("nan"), 1.0], False)],
)
def test_a_label_has_to_be_strictly_the_best(nll: list[float], best: bool) -> None:
    assert label_is_best(torch.tensor(nll)) is best
