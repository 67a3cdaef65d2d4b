"""Layouts of a batch: every example is scored and trained as if it were alone, packed or padded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from residency.backbones import CausalLM
from residency.backbones.layout import choose_layout
from residency.backbones.packed_attention import How, attend_segments, segment_mask
from residency.core.batching import by_token_budget, make_batch, prefix_tree
from residency.core.errors import UserError
from residency.core.types import Batch, Example, Layout
from residency.objectives import SFT

LAYOUTS: list[Layout] = ["packed", "padded"]


def random_example(name: int, prompt: int, *branches: int) -> Example:
    """Random tokens in the given lengths: prompt, completion, alternatives."""
    draw = random.Random(name)
    first, completion, *rest = (tuple(draw.choices(range(257), k=n)) for n in (prompt, *branches))
    return Example.of(domain="d", row=str(name), prompt=first, completion=completion, alternatives=tuple(rest))


# The shortest possible parts included: a prompt of one token, a completion or a label of one token.
PLAIN = [random_example(i, *lengths) for i, lengths in enumerate([(5, 4), (1, 1), (9, 2), (2, 7), (11, 12)])]
BRANCHED = [
    random_example(9, 6, 3, 1, 5),
    random_example(8, 1, 1, 1),
    random_example(7, 4, 2),
    random_example(6, 8, 4, 9, 1),
    # Labels that share beginnings: one is the beginning of another, two part in the middle, two are equal.
    random_example(5, 4, 6).competing(((7, 8, 9), (7, 8), (7, 9, 9, 1), (7, 8, 9), (7, 8, 9, 4, 4))),
]


@pytest.fixture(scope="session", params=["llama", "gpt2", "mistral_folder"])
def packing_case(request: pytest.FixtureRequest) -> tuple[CausalLM, nn.Module, nn.Module]:
    """A backbone, its model as the package runs it, and the same weights as transformers runs them."""
    backbone = CausalLM(path=str(request.getfixturevalue(request.param)))
    return backbone, backbone.load(), AutoModelForCausalLM.from_pretrained(backbone.folder).eval()


def alone(plain: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Any:
    """The plain model on one sequence of its own, with the prompt masked from the labels."""
    ids = torch.tensor([[*prompt, *completion]])
    labels = torch.tensor([[*[-100] * len(prompt), *completion]])
    return plain(input_ids=ids, labels=labels)


def branches(examples: list[Example]) -> list[tuple[int, int, Example, tuple[int, ...]]]:
    """(example, branch, the example itself, tokens) of every sequence that is scored."""
    return [(i, b, e, t) for i, e in enumerate(examples) for b, t in enumerate((e.completion, *e.alternatives))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("examples", [PLAIN, PLAIN[3:4], BRANCHED], ids=["plain", "single", "branched"])
def test_each_branch_is_scored_as_its_own_sequence(
    packing_case: tuple[CausalLM, nn.Module, nn.Module], layout: Layout, examples: list[Example]
) -> None:
    backbone, model, plain = packing_case
    batch = make_batch(examples, layout=layout)
    with torch.no_grad():
        logits = backbone.logits(model, batch)
        assert logits.shape == (len(batch.targets), 257)
        for index, branch, example, tokens in branches(examples):
            mine = (batch.target_example == index) & (batch.target_branch == branch)
            out = alone(plain, example.prompt, tokens)
            assert batch.targets[mine].tolist() == list(tokens)
            torch.testing.assert_close(logits[mine], out.logits[0, len(example.prompt) - 1 : -1], atol=1e-5, rtol=0)
            nll = nn.functional.cross_entropy(logits[mine], batch.targets[mine])
            torch.testing.assert_close(nll, out.loss, atol=1e-5, rtol=0)


def test_loss_and_gradients_do_not_depend_on_the_layout(
    packing_case: tuple[CausalLM, nn.Module, nn.Module],
) -> None:
    """Packed, padded, and the token-weighted mean over sequences that the plain model reads one by one."""
    backbone, model, plain = packing_case
    tokens = sum(len(e.completion) for e in PLAIN)
    wanted = sum(alone(plain, e.prompt, e.completion).loss * len(e.completion) for e in PLAIN) / tokens
    gradients = torch.autograd.grad(wanted, list(plain.parameters()))
    for layout in LAYOUTS:
        outputs = SFT()(lambda batch: backbone.logits(model, batch), make_batch(PLAIN, layout=layout), None)
        torch.testing.assert_close(outputs.loss, wanted, atol=1e-5, rtol=0)
        found = torch.autograd.grad(outputs.loss, list(model.parameters()))
        assert max(float(g.abs().max()) for g in found) > 1e-2
        for (name, _), mine, theirs in zip(model.named_parameters(), found, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_runs_at_supervised_positions_only(
    packing_case: tuple[CausalLM, nn.Module, nn.Module], layout: Layout
) -> None:
    backbone, model, _ = packing_case
    # Two examples that leave columns without any supervised token.
    batch = make_batch([PLAIN[0], PLAIN[4]], layout=layout)
    seen: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    options: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": False}
    if layout == "packed":
        options |= {"position_ids": batch.position_ids, "segments": batch.segments}
    with torch.no_grad():
        kept = backbone.logits(model, batch)
        full = model(input_ids=batch.input_ids, **options).logits.flatten(0, 1)
    handle.remove()
    torch.testing.assert_close(kept, full[batch.target_at], atol=1e-5, rtol=0)
    width = batch.input_ids.shape[1]
    # Padded rows share a head call, so a column counts if it is supervised in any row.
    columns = (batch.target_at % width).unique()
    assert seen == [len(batch.targets if layout == "packed" else columns), width]
    assert seen[0] < width


class WithoutLogitsToKeep(nn.Module):
    """A model that always computes every logit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@torch.no_grad()
def test_a_model_without_logits_to_keep_gives_the_same_logits(llama: Path) -> None:
    backbone = CausalLM(path=str(llama))
    model, batch = backbone.load(), make_batch(BRANCHED, layout="padded")
    slow = backbone.logits(WithoutLogitsToKeep(model), batch)
    torch.testing.assert_close(backbone.logits(model, batch), slow, atol=1e-5, rtol=0)


# --- what a batch says about itself -----------------------------------------------------------------------------------


def test_a_small_packed_batch_by_hand() -> None:
    examples = [
        Example.of(domain="d", row="0", prompt=(1, 2), completion=(3, 4, 5), alternatives=((6,), (7, 8), (3, 4, 9, 5))),
        Example.of(domain="d", row="1", prompt=(9,), completion=(10,)),
    ]
    batch = make_batch(examples, layout="packed")
    # 3 4 is read once for two branches; what only ends a branch is not read.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 9, 7, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0]]
    assert batch.segments == ((2, 3, 1), (1,))
    assert batch.target_at.tolist() == [1, 2, 3, 1, 1, 5, 1, 2, 3, 4, 6]
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 8, 3, 4, 9, 5, 10]
    assert batch.target_example.tolist() == [*[0] * 10, 1]
    assert batch.target_branch.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 0]
    assert (batch.size, batch.tokens, batch.attention_mask) == (2, 7, None)


TREES: list[tuple[list[tuple[int, ...]], Any, list[int]]] = [
    ([()], (3,), []),
    ([(5, 6)], (5,), [5, 6]),
    ([(5, 6), (5, 6), ()], (5,), [5, 6]),
    ([(5, 6), (5, 7)], (4, 1, 1), [5, 6, 7]),
    ([(8,), (5, 6, 1), (5, 7)], (3, (1, 2, 1), 1), [5, 6, 1, 7, 8]),
    ([(5,), (5, 6), (5, 6, 7, 8), (5, 6, 9)], (5, 2, 1), [5, 6, 7, 8, 9]),
    ([(1, 2, 3), (1, 2, 4), (1, 5), (9,)], (3, (1, (1, 1, 1), 1), 1), [1, 2, 3, 4, 5, 9]),
]


@pytest.mark.parametrize(("branches", "segment", "tokens"), TREES)
def test_prefix_trees_by_hand(branches: list[tuple[int, ...]], segment: Any, tokens: list[int]) -> None:
    found, tree, places = prefix_tree(3, branches)
    assert found == segment
    assert [token for token, _ in tree] == tokens
    assert [tuple(tree[k][0] for k in at) for at in places] == branches
    assert [[tree[k][1] for k in at] for at in places] == [list(range(3, 3 + len(b))) for b in branches]


def test_a_tree_hides_exactly_what_a_token_does_not_follow() -> None:
    """Every token of a random tree sees the prompt and the beginning of its own branch, and nothing else."""
    draw = random.Random(0)
    for _ in range(50):
        branches = [tuple(draw.choices((1, 2), k=draw.randint(0, 5))) for _ in range(draw.randint(1, 6))]
        segment, tree, places = prefix_tree(2, branches)
        seen = segment_mask(segment)
        assert seen.shape == (2 + len(tree), 2 + len(tree))
        for at in places:
            for k, place in enumerate(at):
                assert seen[2 + place].nonzero().flatten().tolist() == [0, 1, *(2 + p for p in at[: k + 1])]


def test_padding_is_counted_by_nobody() -> None:
    batch: Batch = make_batch(PLAIN, layout="padded")
    assert batch.attention_mask is not None
    assert batch.tokens == int(batch.attention_mask.sum()) == make_batch(PLAIN, layout="packed").tokens
    assert bool(batch.attention_mask.flatten()[batch.target_at].all())


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        make_batch([], layout="packed")


@pytest.mark.parametrize("budget", [1, 12, 30, 10_000])
def test_token_budget(budget: int) -> None:
    examples = [random_example(i, 1 + i % 7, 1 + i % 5, *[2] * (i % 3)) for i in range(40)]
    groups = list(by_token_budget(examples, tokens=budget))
    assert [e for group in groups for e in group] == examples
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        used = sum(len(e) for e in group)
        assert used <= budget or len(group) == 1
        assert following is None or used + len(following[0]) > budget, "the next example would still have fitted"


# --- who sees whom ----------------------------------------------------------------------------------------------------

MASKS: list[tuple[tuple[int, ...], int | None, list[str]]] = [
    ((3,), None, ["1..", "11.", "111"]),
    ((3,), 2, ["1..", "11.", ".11"]),
    ((3,), 3, ["1..", "11.", "111"]),
    # prompt of two, a branch of one, a branch of none, a branch of two
    ((2, 1, 0, 2), None, ["1....", "11...", "111..", "11.1.", "11.11"]),
    ((2, 1, 0, 2), 2, ["1....", "11...", ".11..", ".1.1.", "...11"]),
    ((2, 1, 0, 2), 3, ["1....", "11...", "111..", "11.1.", ".1.11"]),
    # prompt of one, a branch of one that branches into one and two, a branch of one
    ((1, (1, 1, 2), 1), None, ["1.....", "11....", "111...", "11.1..", "11.11.", "1....1"]),
    ((1, (1, 1, 2), 1), 2, ["1.....", "11....", ".11...", ".1.1..", "...11.", "1....1"]),
]


@pytest.mark.parametrize(("segment", "window", "rows"), MASKS)
def test_segment_mask_by_hand(segment: tuple[int, ...], window: int | None, rows: list[str]) -> None:
    assert segment_mask(segment, window).tolist() == [[c == "1" for c in row] for row in rows]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_attention_of_segments_is_masked_softmax(window: int | None) -> None:
    """Against one dense softmax over the whole row with a block mask; two query heads share a key head."""
    segments = ((4,), (3, 2, 1), (1,), (6,))
    n = sum(map(sum, segments))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.block_diag(*[segment_mask(s, window) for s in segments]).bool()
    wide_key, wide_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ wide_key.mT * 0.3).masked_fill(~mask, -torch.inf)
    found = attend_segments(query, key, value, segments, How(scale=0.3, window=window))
    torch.testing.assert_close(found, scores.softmax(-1) @ wide_value, atol=1e-12, rtol=0)


# --- the choice of a layout -------------------------------------------------------------------------------------------


class Smeared(CausalLM):
    """Every token sees the one before it in the row, like the state of a recurrent layer that nobody resets."""

    def load(self) -> nn.Module:
        model = super().load()

        def smear(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + 0.5 * nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

        model.get_input_embeddings().register_forward_hook(smear)
        return model


class OwnAttention(CausalLM):
    """Transformers' own attention, which finds plain segments from their positions but knows no branches."""

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()


class OwnForward(CausalLM):
    """A model whose forward knows nothing of segments."""

    def load(self) -> nn.Module:
        return WithoutLogitsToKeep(super().load())


def test_packing_is_chosen_where_it_is_exact(packing_case: tuple[CausalLM, nn.Module, nn.Module]) -> None:
    backbone, model, _ = packing_case
    model.train()
    assert choose_layout("auto", backbone, model)[0] == choose_layout("packed", backbone, model)[0] == "packed"
    assert model.training, "the check must not leave the model in another mode"
    model.eval()
    assert choose_layout("padded", backbone, model)[0] == "padded"


@pytest.mark.parametrize("kind", [Smeared, OwnAttention, OwnForward])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packing_is_refused_where_examples_would_see_each_other(
    kind: type[CausalLM], architecture: str, request: pytest.FixtureRequest
) -> None:
    backbone = kind(path=str(request.getfixturevalue(architecture)))
    model = backbone.load()
    with pytest.raises(UserError, match=r"model\.layout is packed") as caught:
        choose_layout("packed", backbone, model)
    assert "auto or padded" in caught.value.fix
    layout, reason = choose_layout("auto", backbone, model)
    assert layout == "padded"
    assert "this model" in reason


@torch.no_grad()
def test_a_model_that_leaks_is_still_right_when_padded(llama: Path) -> None:
    """The counterpart of the refusal: on the smeared model padding is exact and packing is not."""
    backbone = Smeared(path=str(llama))
    model = backbone.load()
    single = torch.cat([backbone.logits(model, make_batch([e], layout="padded")) for e in PLAIN])
    padded, packed = (backbone.logits(model, make_batch(PLAIN, layout=layout)) for layout in ("padded", "packed"))
    torch.testing.assert_close(padded, single, atol=1e-5, rtol=0)
    assert float((packed - single).abs().max()) > 1e-2


@torch.no_grad()
def test_a_prompt_alone_is_read_and_has_no_target(llama: Path) -> None:
    backbone = CausalLM(path=str(llama))
    model = backbone.load()
    bare = Example(domain="a", row="bare", prompt=(5, 6, 7), branches=())
    mixed = [PLAIN[0], bare, PLAIN[1]]
    for layout in ("packed", "padded"):
        batch = make_batch(mixed, layout=layout)
        assert {*batch.target_example.tolist()} == {0, 2}
        assert batch.tokens == make_batch([PLAIN[0], PLAIN[1]], layout=layout).tokens + 3
        expected = backbone.logits(model, make_batch([PLAIN[0], PLAIN[1]], layout="padded"))
        torch.testing.assert_close(backbone.logits(model, batch), expected, atol=1e-5, rtol=0)


def test_a_batch_is_moved_whole() -> None:
    examples = [Example.of(domain="a", row="0", prompt=(1, 2), completion=(3,))]
    batch = make_batch(examples, layout="padded")
    moved = batch.to("meta")
    for name in ("input_ids", "position_ids", "attention_mask", "target_at", "targets"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(batch, name).device.type == "cpu", name
    assert moved.examples is batch.examples
