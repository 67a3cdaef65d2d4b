"""Weight mixing: exact at both ends, and in between a mean of what the weights do, not of how they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig
from torch import Tensor, nn

from residency.adapters import Adapter, Full, Peft
from residency.adapters.peft import lora, low_rank_factors
from residency.backbones import CausalLM
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.engine.module import ContinualModule
from residency.mitigations import Mitigation, WeightMixing
from residency.mitigations.merging.weight_mixing import mix
from residency.objectives import SFT
from residency.scorers.find import scorers_by_name
from residency.testing.tiny_runs import domains, train

Named = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return randn(rows, rank, seed=seed) @ randn(rank, columns, seed=seed + 100)


def optimum(matrix: Tensor, rank: int) -> float:
    """Norm of what no matrix of this rank can hold (Eckart and Young)."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


# --- the mean ---------------------------------------------------------------------------------------------------------


def test_the_ends_are_the_very_objects() -> None:
    before, after = {"a": randn(3)}, {"a": randn(3, seed=1)}
    assert mix(before, after, alpha=0) is mix(before, after, alpha=0.0) is before
    assert mix(before, after, alpha=1) is mix(before, after, alpha=1.0) is after


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_the_interior_is_the_mean(alpha: float) -> None:
    before, after = {"a": randn(50), "b": randn(2, 3)}, {"a": randn(50, seed=1), "b": randn(2, 3, seed=1)}
    mixed = mix(before, after, alpha=alpha)
    assert [*mixed] == ["a", "b"]
    for name, value in mixed.items():
        wanted = (1 - alpha) * before[name].double() + alpha * after[name].double()
        torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=0)
    same = mix(before, before, alpha=alpha)
    assert all(torch.equal(same[name], before[name]) for name in before), "what did not move must not drift"


# --- factors of a matrix ----------------------------------------------------------------------------------------------

# Small ones are factored by a full decomposition, large ones by a randomised one.
SIZES = pytest.mark.parametrize(("rows", "columns"), [(12, 20), (16, 9), (90, 70), (64, 200)])


@SIZES
@pytest.mark.parametrize("true_rank", [1, 3, 4])
def test_factors_are_exact_up_to_their_rank(rows: int, columns: int, true_rank: int) -> None:
    matrix = of_rank(true_rank, rows, columns)
    b, a = low_rank_factors(matrix, rank=4, a_norm=2.0)
    assert (b.shape, a.shape) == ((rows, 4), (4, columns))
    assert float((b @ a - matrix).norm()) < 1e-5 * float(matrix.norm())


@SIZES
def test_factors_of_a_mean_of_two_updates_are_the_best_ones(rows: int, columns: int) -> None:
    matrix = 0.5 * of_rank(4, rows, columns) + 0.5 * of_rank(4, rows, columns, seed=1)
    b, a = low_rank_factors(matrix, rank=4, a_norm=2.0)
    assert optimum(matrix, 4) > 0.1 * float(matrix.norm())
    assert float((b @ a - matrix).norm()) == pytest.approx(optimum(matrix, 4), rel=1e-4)


@SIZES
def test_factors_of_any_matrix_are_nearly_the_best_ones(rows: int, columns: int) -> None:
    """A flat spectrum is the hardest case of the randomised decomposition: it loses a hundredth at most."""
    matrix = randn(rows, columns)
    b, a = low_rank_factors(matrix, rank=4, a_norm=2.0)
    error = float((b @ a - matrix).norm())
    assert (
        optimum(matrix, 4) * (1 - 1e-5) <= error <= optimum(matrix, 4) * (1.01 if min(rows, columns) > 16 else 1 + 1e-5)
    )


@SIZES
@pytest.mark.parametrize(("a_norm", "wanted"), [(0.3, 0.3), (7.0, 7.0), (0.0, 1.0)])
def test_the_gauge_keeps_the_size_of_a(rows: int, columns: int, a_norm: float, wanted: float) -> None:
    """A has orthogonal rows of equal length and the norm it had, also where the matrix is zero and B is."""
    for matrix in (randn(rows, columns), torch.zeros(rows, columns)):
        b, a = low_rank_factors(matrix, rank=4, a_norm=a_norm)
        assert float(a.norm()) == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(a @ a.T, torch.eye(4) * wanted**2 / 4, atol=1e-5 * wanted**2, rtol=0)
    assert not b.any()


@pytest.mark.parametrize(("rows", "columns"), [(4, 30), (30, 4), (4, 4)])
def test_a_rank_above_the_dimensions(rows: int, columns: int) -> None:
    """As PEFT allows it: the shapes are those of the adapter, the product is exact."""
    matrix = randn(rows, columns)
    b, a = low_rank_factors(matrix, rank=8, a_norm=3.0)
    assert (b.shape, a.shape) == ((rows, 8), (8, columns))
    torch.testing.assert_close(b @ a, matrix, atol=1e-5, rtol=0)
    assert float(a.norm()) == pytest.approx(3.0, rel=1e-5)


@SIZES
def test_factors_are_a_function_of_the_matrix(rows: int, columns: int) -> None:
    """The draw of the randomised decomposition neither reads nor moves the global generator."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(low_rank_factors(randn(rows, columns), rank=4, a_norm=1.0))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


# --- in the space of updates ------------------------------------------------------------------------------------------


def attached(folder: Path, **options: Any) -> tuple[Peft, nn.Module, list[Named]]:
    """A LoRA model and two states of it, with factors of equal size as training leaves them."""
    adapter = lora(target_modules=["q_proj", "down_proj"], lora_alpha=12, **options)
    model = adapter.attach(CausalLM(path=str(folder)).load())
    shapes = {name: leaf.shape for name, leaf in adapter.trainable(model).items()}
    states = [{n: randn(*s, seed=1000 * k + i) for i, (n, s) in enumerate(shapes.items())} for k in range(2)]
    return adapter, model, states


def updates(model: nn.Module, state: Named, scale: float) -> Named:
    """s B A by the name of A, written out."""
    return {n: scale * state[n.replace("lora_A", "lora_B")] @ state[n] for n in state if "lora_A" in n}


@pytest.mark.parametrize(("options", "scale"), [({"r": 4}, 3.0), ({"r": 4, "use_rslora": True}, 6.0), ({"r": 40}, 0.3)])
def test_lora_is_mixed_in_the_space_of_updates(options: dict[str, Any], scale: float, llama: Path) -> None:
    """Against the dense mean; the mean of the factors misses it by more than half of its norm."""
    adapter, model, states = attached(llama, **options)
    first, second = (updates(model, state, scale) for state in states)
    mixed = mix(*(adapter.weights(model, state) for state in states), alpha=0.5)
    assert {*mixed} == {*first}
    factors = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    naive = updates(model, factors, scale)
    lost = total = 0.0
    for name in mixed:
        dense = 0.5 * first[name] + 0.5 * second[name]
        torch.testing.assert_close(mixed[name], dense, atol=1e-4, rtol=1e-4)
        assert float((naive[name] - dense).norm()) > 0.5 * float(dense.norm())
        lost, total = lost + optimum(dense, options["r"]) ** 2, total + float(dense.norm()) ** 2
    norms = {name: float(leaf.detach().norm()) for name, leaf in adapter.trainable(model).items() if "lora_A" in name}
    facts = adapter.load_weights(model, mixed)
    back = updates(model, adapter.state(model), scale)
    error = math.sqrt(sum(float((back[n] - mixed[n]).norm()) ** 2 for n in mixed))
    assert error == pytest.approx(math.sqrt(lost), rel=1e-3, abs=1e-3)
    assert facts["truncation"] == pytest.approx(math.sqrt(lost / total), rel=1e-3, abs=1e-5)
    for name, leaf in adapter.state(model).items():
        assert "lora_A" not in name or float(leaf.norm()) == pytest.approx(norms[name], rel=1e-5)


# --- in a stream ------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "full": Full,
    "lora": lambda: lora(target_modules="all-linear", r=2, lora_alpha=4),
}
Run = Callable[..., tuple[dict[str, Any], list[Named]]]


@pytest.fixture(scope="session")
def mixing_run(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Run:
    """Two domains with an adapter and perhaps a mixing: the record, and the weights after each stage. Each run once."""
    done: dict[Any, tuple[dict[str, Any], list[Named]]] = {}

    def run(adapter: str, **options: Any) -> tuple[dict[str, Any], list[Named]]:
        key = (adapter, *options.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("mixing")
            readers = domains(folder / "data", {"a": "generative", "b": "label"})
            for reader in readers.values():
                reader.scorers = scorers_by_name(["nll"], where="test")
            parts: dict[str, Mitigation] = {"mix": WeightMixing(**options)} if options else {}
            record, _ = train(folder / "run", llama, ADAPTERS[adapter](), parts, steps=3, data={"domains": readers})
            states = [load_tree(folder / "run" / "stages" / s / "state.safetensors") for s in ("1-a", "2-b")]
            done[key] = record, [state["weights"] for state in states]
        return done[key]

    return run


def equal(one: Named, other: Named) -> bool:
    return {*one} == {*other} and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alpha_one_is_the_run_without_mixing(adapter: str, mixing_run: Run) -> None:
    plain, mixed = mixing_run(adapter), mixing_run(adapter, alpha=1.0)
    assert all(equal(one, other) for one, other in zip(plain[1], mixed[1], strict=True))
    assert plain[0]["scores"] == mixed[0]["scores"]
    assert not equal(*plain[1]), "the second stage was to change something"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alpha_zero_undoes_the_stage(adapter: str, mixing_run: Run) -> None:
    """Weights bit-equal to those before the stage, and so are the scores; the first stage counts."""
    plain, undone = mixing_run(adapter), mixing_run(adapter, alpha=0.0)
    assert equal(*undone[1])
    assert equal(undone[1][0], plain[1][0])
    rows = undone[0]["scores"]["nll"]["R"]
    assert rows[2] == rows[1] != rows[0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_first_stage_can_be_undone_too(adapter: str, mixing_run: Run) -> None:
    rows = mixing_run(adapter, alpha=0.0, first=True)[0]["scores"]["nll"]["R"]
    assert rows[0] == rows[1] == rows[2]


def test_full_weights_are_the_mean_of_both_stages(mixing_run: Run) -> None:
    (first, second), half = mixing_run("full")[1], mixing_run("full", alpha=0.25)[1]
    assert equal(half[0], first)
    assert equal(half[1], {name: torch.lerp(first[name], second[name], 0.25) for name in first})


def test_lora_updates_are_the_best_approximation_of_the_mean(mixing_run: Run) -> None:
    (first, second), half = mixing_run("lora")[1], mixing_run("lora", alpha=0.5)[1]
    assert equal(half[0], first)
    one, two, found = (updates(nn.Module(), state, 2.0) for state in (first, second, half[1]))
    for name in found:
        dense = 0.5 * one[name] + 0.5 * two[name]
        assert float((found[name] - dense).norm()) == pytest.approx(optimum(dense, 2), rel=1e-3, abs=1e-6)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_weight_outside_of_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha="):
        WeightMixing(alpha=alpha)


def test_an_adapter_that_cannot_be_averaged_is_refused(llama: Path) -> None:
    adapter = Peft(config=OFTConfig(target_modules="all-linear", oft_block_size=8))
    with pytest.raises(UserError, match="averageable") as caught:
        ContinualModule(
            backbone=CausalLM(path=str(llama)), adapter=adapter, objective=SFT(), mitigations={"mix": WeightMixing()}
        )
    assert "replay" in caught.value.fix
