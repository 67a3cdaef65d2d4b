"""Keys: what can change a bit changes the key, what cannot does not."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import residency.adapters
import residency.mitigations
from residency.core.tensor_files import load_tree
from residency.core.types import Stage
from residency.runs.cli import parse
from residency.runs.folder import RunFolder
from residency.runs.keys import RunKeys
from residency.runs.stream import open_stage_cache
from residency.testing.tiny_models import write_domain
from residency.testing.tiny_runs import train
from support.cli import tiny_config, write_yaml
from support.tiny_sweeps import EWC, MIXING, REPLAY, mitigation
from table import ADAPTERS, MITIGATIONS


@pytest.fixture(scope="module")
def lineage(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: overrides -> keys of the tiny stream of three domains."""
    folder = tmp_path_factory.mktemp("lineage")
    base = tiny_config(folder / "data", llama)
    base["data"]["domains"]["c"] = write_domain(folder / "data", "c")
    config = write_yaml(folder / "base.yaml", base)

    @cache
    def keys(overrides: tuple[str, ...]) -> RunKeys:
        cli = parse(["fit", "--config", str(config), f"--store={folder / 'store'}", *overrides])
        parts: dict[str, Any] = {"module": cli.model, "data": cli.datamodule, "trainers": cli.trainers}
        return open_stage_cache(**parts, settings=cli.settings, config=cli.resolved).keys

    def call(overrides: Mapping[str, Any] | None = None, *words: str) -> RunKeys:
        import json

        return keys((*(f"--{k}={json.dumps(v)}" for k, v in (overrides or {}).items()), *words))

    return call


def common(one: RunKeys, other: RunKeys) -> tuple[int, int]:
    """How many first stages two runs train together, and how many states they score together."""
    pairs = list(zip(one.stages, other.stages, strict=False))
    trained = [a.trained == b.trained for a, b in pairs]
    weights = [a.weights == b.weights for a, b in pairs]
    return [*trained, False].index(False), [*weights, False].index(False)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ({}, {}, (3, 3)),
        ({}, REPLAY, (1, 1)),
        ({}, EWC(10.0), (1, 1)),
        (EWC(10.0), EWC(1000.0), (1, 1)),
        (EWC(10.0), EWC(10.0, "online"), (1, 1)),
        ({}, MIXING, (2, 1)),
        (MIXING, {**MIXING, **EWC(10.0)}, (1, 1)),
        # Strength 0 is off: bit for bit the plain run (test_conformance), so it is shared.
        ({}, EWC(0.0), (3, 3)),
    ],
    ids=["same", "replay", "ewc", "strengths", "modes", "mixing", "added", "off"],
)
def test_runs_share_what_their_mitigations_do_not_touch(
    one: Mapping[str, Any], other: Mapping[str, Any], shared: tuple[int, int], lineage: Any
) -> None:
    assert common(lineage(one), lineage(other)) == shared
    assert common(lineage(other), lineage(one)) == shared


def test_what_follows_training_is_shared_by_strengths_and_not_by_modes(lineage: Any) -> None:
    weak, strong, online = lineage(EWC(10.0)), lineage(EWC(1000.0)), lineage(EWC(10.0, "online"))
    assert weak.stages[0].finished == strong.stages[0].finished
    assert weak.stages[1].finished != strong.stages[1].finished
    assert weak.stages[0].finished != online.stages[0].finished
    plain = lineage({})
    assert plain.stages[0].finished == plain.stages[0].trained


def test_what_is_served_is_no_part_of_training(lineage: Any) -> None:
    plain, half, third = lineage({}), *(lineage(mitigation("WiseFT", alpha=alpha)) for alpha in (0.5, 0.3))
    for one, other, more in zip(plain.stages, half.stages, third.stages, strict=True):
        assert (one.trained, one.weights) == (other.trained, other.weights) == (more.trained, more.weights)
        assert one.served == one.weights
        assert len({one.served, other.served, more.served}) == 3
        assert len({one.finished, other.finished, more.finished}) == 3


def test_nothing_is_remembered_of_the_last_stage(lineage: Any) -> None:
    ewc, mixing = lineage(EWC(10.0)).stages, lineage({**EWC(10.0), **MIXING}).stages
    assert [stage.finished == stage.trained for stage in ewc] == [False, False, True]
    assert [stage.finished == stage.weights for stage in mixing] == [False, False, True]
    assert mixing[-1].weights != mixing[-1].trained
    # A stream that goes on has trained the same stage, and remembers it.
    short = lineage(EWC(10.0), "--data.order=[a, b]").stages
    assert (short[1].trained, short[1].finished) == (ewc[1].trained, ewc[1].trained)


@pytest.mark.parametrize(
    "words",
    [
        "--model.optimizer.lr=0.01",
        "--model.adapter.config.r=2",
        "--trainer.max_steps=2",
        "--trainer.gradient_clip_val=0.5",
        "--trainer.precision=bf16-true",
        "--data.batch_size=2",
        "--data.micro_batch_size=2",
        "--seed_everything=1",
        "--model.layout=padded",
        '--data.domains.a.template={"prompt": "{prompt}?"}',
        "--data.domains.a.max_train=5",
    ],
)
def test_what_changes_numbers_changes_every_stage(words: str, lineage: Any) -> None:
    assert common(lineage({}), lineage({}, words)) == (0, 0)


@pytest.mark.parametrize(
    "words",
    [
        "--name=other",
        "--trainer.enable_progress_bar=true",
        "--checkpoint_every_n_steps=1",
        "--evaluation.batch_tokens=64",
        '--axes={"x": 1}',
        "--wandb.group=g",
    ],
)
def test_what_changes_no_number_changes_no_stage(words: str, lineage: Any) -> None:
    assert common(lineage({}), lineage({}, words)) == (3, 3)


def test_orders_share_their_common_start_and_a_domain_alone_is_one(lineage: Any) -> None:
    plain = lineage({})
    assert common(plain, lineage({}, "--data.order=[a, c, b]")) == (1, 1)
    assert common(plain, lineage({}, "--data.order=[b, a, c]")) == (0, 0)
    assert common(plain, lineage({}, "--data.order=[a]")) == (1, 1)


def test_more_threads_are_another_environment(lineage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lineage({}, "--name=one")
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert common(before, lineage({}, "--name=two")) == (0, 0)


def test_scores_know_state_column_and_settings(lineage: Any) -> None:
    from residency.engine.scoring.settings import EvaluationSettings

    options: dict[str, Any] = {"split": "test", "settings": EvaluationSettings(), "layout": "packed"}
    plain, other = lineage({}), lineage(EWC(10.0))
    assert plain.scores(0, "a", **options) == other.scores(0, "a", **options)
    assert plain.scores(1, "a", **options) == other.scores(1, "a", **options)
    assert plain.scores(2, "a", **options) != other.scores(2, "a", **options)
    different = [plain.scores(k, column, **options) for k in range(4) for column in "abc"]
    changes = ({"split": "validation"}, {"settings": EvaluationSettings(generation_rows=1)}, {"layout": "padded"})
    different += [plain.scores(0, "a", **{**options, **change}) for change in changes]
    assert len({*different}) == len(different)


@pytest.mark.parametrize(
    ("plug_in", "edited"), [(EWC(10.0), "penalties.ewc"), (REPLAY, "rehearsal.replay"), (REPLAY, "rehearsal.selection")]
)
def test_an_edited_plug_in_is_another_one(
    plug_in: Mapping[str, Any], edited: str, lineage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own file, or one of those beside it from which it takes functions, near or far."""
    from residency.runs import code_identity

    before = lineage(plug_in, f"--name=before-{edited}")
    original, name = code_identity._definitions, f"residency.mitigations.{edited}"
    monkeypatch.setattr(code_identity, "_definitions", lambda n: (*original(n), *["edited"] * (n == name)))
    # A process hashes a class once; an edit is another process's business.
    monkeypatch.setattr(code_identity, "_class_code", code_identity._class_code.__wrapped__)
    after = lineage(plug_in, f"--name=after-{edited}")
    assert common(before, after) == (1, 1)
    assert before.stages[0].finished != after.stages[0].finished


# -- the declarations that keys rely on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights of the tiny stream's first stage without mitigations."""
    return first_weights(tmp_path_factory.mktemp("plain"), llama, {})


def first_weights(folder: Path, llama: Path, mitigations: Mapping[str, Any]) -> Any:
    train(folder / "run", llama, ADAPTERS["lora"].make(), mitigations, steps=2, kinds={"a": "generative"})
    run = RunFolder(folder / "run")
    return load_tree(run.stage(1, "a") / "state.safetensors")["weights"]


@pytest.mark.parametrize("name", MITIGATIONS)
def test_before_its_first_domain_a_mitigation_changes_no_bit(
    name: str, plain: Any, llama: Path, tmp_path: Path
) -> None:
    mitigation = MITIGATIONS[name].make()
    if mitigation.touches_training(0) or mitigation.changes_weights(0):
        pytest.skip("it takes part in the first stage, and says so")
    weights = first_weights(tmp_path, llama, {name: mitigation})
    assert all(weights[tensor].equal(plain[tensor]) for tensor in plain)
    assert {*weights} == {*plain}


def test_who_looks_at_the_length_of_the_stream_says_so() -> None:
    classes = [part for package in (residency.mitigations, residency.adapters) for part in vars(package).values()]
    checked = 0
    for part in {c for c in classes if inspect.isclass(c) and hasattr(c, "uses_stream_length")}:
        attributes = [n for n in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(part)))) if _is_length(n)]
        assert part.uses_stream_length or not attributes, f"{part.__name__} reads stage.stages"
        checked += 1
    assert checked >= 5
    assert "stages" in Stage.__annotations__


def _is_length(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "stages"
