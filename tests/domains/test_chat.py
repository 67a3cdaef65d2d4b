"""Chat templates: which tokens are supervised, by hand and against transformers' assistant mask where that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.core.types import Example, Row
from residency.domains import Chat, Table, Template
from residency.domains.lengths import Limits, fit_length
from residency.domains.tokens import supervised_tokens
from residency.testing.tiny_models import write_tokenizer

TALK = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6 👩"},
)
# Forms of ChatML (SmolLM, Qwen) and of Llama 3, with generation marks and without.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}OPEN"
    "{{ m.content + '<|im_end|>' }}CLOSE{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|body|>\n\n' }}"
    "{% if m.role == 'assistant' %}OPEN{{ m.content + '<|im_end|>' }}CLOSE"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}"
)
MARKS = {"OPEN": "{% generation %}", "CLOSE": "{% endgeneration %}"}
# Earlier answers lose their thoughts: what is learnt there is not what will be asked for (Qwen3, DeepSeek).
FORGETFUL = CHATML.replace("m.content + '<|im_end|>'", "(m.content if loop.last else 'short') + '<|im_end|>'", 1)


def marked(template: str, on: bool) -> str:
    for name, mark in MARKS.items():
        template = template.replace(name, mark if on else "")
    return template


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = write_tokenizer(tmp_path_factory.mktemp("chat"))
    extra = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|body|>"]
    found.add_special_tokens({"extra_special_tokens": extra})
    return found


def talk(turns: tuple[dict[str, Any], ...] = TALK, **facts: Any) -> Row:
    return Row(id="1", prompt="", completion=turns[-1]["content"], kind="messages", messages=turns, **facts)


def supervised(example: Example) -> list[tuple[int, ...]]:
    """The supervised runs of the first branch."""
    runs: list[list[int]] = []
    branch, before = example.branches[0], -2
    for k in branch.supervised:
        if k != before + 1:
            runs.append([])
        runs[-1].append(branch.tokens[k])
        before = k
    return [tuple(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("on", [True, False])
def test_every_answer_and_its_end_are_supervised_and_nothing_else(template: str, on: bool, tokenizer: Any) -> None:
    example = Chat(jinja=marked(template, on)).encode(tokenizer, domain="d", row=talk())
    said = [tokenizer(f"{text}<|im_end|>", add_special_tokens=False).input_ids for text in ("4", "6 👩")]
    assert supervised(example) == [tuple(ids) for ids in said]
    whole = tokenizer.apply_chat_template(
        [dict(turn) for turn in TALK], chat_template=marked(template, on), return_dict=False
    )
    read = [*example.prompt, *example.branches[0].tokens]
    assert read == whole[: len(read)]
    assert "<|im_end|>" not in tokenizer.decode(whole[len(read) :])


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_the_mask_is_that_of_transformers_where_characters_are_single_tokens(template: str, tokenizer: Any) -> None:
    plain = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"})
    turns = [dict(turn) for turn in plain * 2]
    theirs = tokenizer.apply_chat_template(
        turns, chat_template=marked(template, True), return_dict=True, return_assistant_tokens_mask=True
    )
    example = Chat(jinja=marked(template, True)).encode(tokenizer, domain="d", row=talk(plain * 2))
    places = [len(example.prompt) + k for k in example.branches[0].supervised]
    assert places == [k for k, on in enumerate(theirs["assistant_masks"]) if on]


def test_transformers_own_mask_is_still_wrong_for_characters_of_several_tokens(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "👩"}]
    template = marked(CHATML, True).replace("m.content + '<|im_end|>'", "m.content", 1)
    theirs = tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(theirs["assistant_masks"]) == 1, "mended: compare whole masks"
    ours = Chat(jinja=template).encode(tokenizer, domain="d", row=talk(tuple(turns)))
    assert ours.targets == len(tokenizer("👩").input_ids) + 1


def test_offsets_that_leave_blanks_out_and_empty_tokens_are_covered() -> None:
    assert supervised_tokens([(0, 3), (4, 8), (8, 9)], [(3, 8)]) == [False, True, False]
    assert supervised_tokens([(0, 1), (0, 1), (0, 1), (1, 2)], [(0, 1)]) == [True, True, True, False]


def test_control_tokens_in_the_text_stay_text(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = ({"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "<|im_end|>y"})
    for on in (True, False):
        example = Chat(jinja=marked(CHATML, on)).encode(tokenizer, domain="d", row=talk(turns))
        ids = [*example.prompt, *example.branches[0].tokens]
        theirs = tokenizer.apply_chat_template(
            [dict(t) for t in turns],
            chat_template=marked(CHATML, on),
            return_dict=False,
            sanitize_control_tokens=True,
        )
        assert ids == theirs[: len(ids)]
        assert example.branches[0].tokens.count(end) == 1
    plain = Template().encode(tokenizer, domain="d", row=Row(id="1", prompt="x<|end|>", completion="<|end|>y"))
    assert plain.prompt.count(tokenizer.eos_token_id) == 0
    assert plain.completion.count(tokenizer.eos_token_id) == 1


def test_a_template_that_rewrites_earlier_answers_is_refused_and_its_last_answer_is_not(tokenizer: Any) -> None:
    template = marked(FORGETFUL, False)
    with pytest.raises(UserError, match="otherwise when turns follow"):
        Chat(jinja=template).encode(tokenizer, domain="d", row=talk())
    example = Chat(jinja=template, supervise="last").encode(tokenizer, domain="d", row=talk())
    assert supervised(example) == [tuple(tokenizer("6 👩<|im_end|>").input_ids)]


@pytest.mark.parametrize(
    ("template", "turns", "got"),
    [
        (CHATML.replace("m.content", "m.content|trim"), ({"role": "assistant", "content": "  x"},), "blanks around"),
        ("{{ raise_exception('no') }}", ({"role": "assistant", "content": "x"},), "template fails"),
        ("{% for m in messages %}x{% endfor %}", ({"role": "assistant", "content": "y"},), "the text of"),
        ("{{ messages[0]['content'] * 200000 }}", ({"role": "assistant", "content": "y"},), "repeats itself"),
    ],
)
def test_templates_that_lose_or_refuse_a_row_are_named(template: str, turns: Any, got: str, tokenizer: Any) -> None:
    row = talk(({"role": "user", "content": "ask"}, *turns))
    with pytest.raises(UserError) as caught:
        Chat(jinja=marked(template, True)).encode(tokenizer, domain="d", row=row)
    assert got in str(caught.value)


def test_labels_and_pairs_branch_from_one_prompt(tokenizer: Any) -> None:
    chat = Chat(jinja=marked(CHATML, False))
    label = Row(id="1", prompt="how?", completion="good", kind="labelled")
    example = chat.encode(tokenizer, domain="d", row=label, labels=("bad", "good"))
    assert [branch.role for branch in example.branches] == ["completion", "label"]
    asked = [{"role": "user", "content": "how?"}]
    start = tokenizer.apply_chat_template(
        asked, chat_template=chat.jinja, add_generation_prompt=True, return_dict=False
    )
    assert list(example.prompt) == start
    pair = Row(id="2", prompt="p", completion="yes", kind="pair", rejected="no", weight=0.5)
    both = chat.encode(tokenizer, domain="d", row=pair)
    assert [(branch.role, branch.weight) for branch in both.branches] == [("chosen", 0.5), ("rejected", 0.5)]
    asks = chat.encode(tokenizer, domain="d", row=Row(id="3", prompt="p", completion="", kind="prompt"))
    assert asks.branches == ()
    assert asks.prompt == both.prompt


LONG = Row(id="1", prompt="instruction\n" + "x" * 90, completion="y" * 20)


def test_each_policy_for_what_is_too_long(tokenizer: Any) -> None:
    def encode(policy: Any, split: Any = "train", **options: Any) -> Example:
        template = Template(max_tokens=60, too_long=policy, keep_prefix="line", tokenise="apart", **options)
        return template.encode(tokenizer, domain="d", row=LONG, split=split)

    whole = encode("drop")
    assert (len(whole.prompt), len(whole.completion)) == (103, 22)
    assert whole.cut_prompt > 0
    cut = encode("truncate_prompt")
    assert (len(cut), cut.cut_prompt, cut.cut_completion) == (60, 65, 0)
    assert tokenizer.decode(cut.prompt).startswith("instruction\nx")
    assert cut.completion == whole.completion
    assert encode("drop", "test") == cut
    end = encode("truncate", max_prompt_tokens=50)
    assert (len(end.prompt), len(end.completion), end.cut_completion) == (50, 10, 12)
    assert tokenizer.eos_token_id not in end.completion
    with pytest.raises(UserError, match="1 of them not to be cut, and 9 to write; limit 5"):
        fit_length(Example.of(domain="d", row="r", prompt=(1,), completion=(2,) * 9, split="test"), (0, 0), LIMITS)


LIMITS = Limits(tokens=5, prompt=None, policy="truncate_prompt")


def test_conversations_are_read_by_the_chat_template_unless_told_otherwise(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]}\n'
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(line % f"{name} {k}" for k in range(30)))
    domain = Table(path=str(tmp_path))
    assert domain.template == Chat()
    assert Table(path=str(tmp_path), template=Chat(supervise="last")).fingerprint() != domain.fingerprint()
