"""MagMax: per parameter the largest change of any stage; training goes on unmerged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residency.core.errors import UserError
from residency.core.tensors import size_in_bytes
from residency.mitigations import MagMax, Mitigation, TaskArithmetic
from residency.mitigations.merging.magmax import larger, largest_changes
from support.two_stages import equal, randn, two_stages

Named = dict[str, torch.Tensor]


def all_at_once(vectors: list[torch.Tensor]) -> torch.Tensor:
    """What the released code computes from a stack of task vectors: the entry of largest magnitude, the last of
    equals."""
    stacked = np.stack([vector.numpy() for vector in vectors])[::-1]
    chosen = np.abs(stacked).argmax(0)
    return torch.from_numpy(np.take_along_axis(stacked, chosen[None], 0)[0].copy())


def test_by_hand() -> None:
    """The fixture: (1, -3, 0, 2) and (-2, 1, .5, -2), halved; of 2 and -2 the later one."""
    one, two = torch.tensor([1.0, -3.0, 0.0, 2.0]), torch.tensor([-2.0, 1.0, 0.5, -2.0])
    assert larger(one, two).tolist() == [-2.0, -3.0, 0.5, -2.0]
    assert larger(two, one).tolist() == [-2.0, -3.0, 0.5, 2.0]


def test_one_vector_is_as_good_as_all() -> None:
    """With many equal magnitudes."""
    vectors = [(4 * randn(5, 8, seed=k)).round() for k in range(5)]
    base = {"w": randn(5, 8, seed=9)}
    running: Named = {}
    for vector in vectors:
        running = largest_changes(running, {"w": 0 * base["w"]}, {"w": vector}, past=1.0)
    assert torch.equal(running["w"], all_at_once(vectors))
    assert torch.equal(larger(vectors[0], larger(vectors[1], vectors[2])), all_at_once(vectors[:3]))


def test_what_fades_is_compared_faded() -> None:
    base = {"w": torch.zeros(2)}
    first = largest_changes({}, base, {"w": torch.tensor([4.0, 1.0])}, past=0.5)
    second = largest_changes(first, base, {"w": torch.tensor([-1.0, 1.0])}, past=0.5)
    assert first["w"].tolist() == [4.0, 1.0]
    assert second["w"].tolist() == [2.0, 1.0]


def test_half_precision_and_integers() -> None:
    base = {"w": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor([1])}
    found = largest_changes({}, base, {"w": base["w"] + 0.25, "n": torch.tensor([2])}, past=1.0)
    assert found["w"].dtype == torch.float32
    assert found["w"].tolist() == [0.25] * 3
    assert "n" not in found


def served() -> Mitigation:
    return MagMax(strength=0.5)


def test_in_a_stream_training_is_plain(llama: Path) -> None:
    """Weights are those of plain training after every stage; what is served is θ_0 + ½ of the larger change."""
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", served)
    start = {name: leaf.detach() for name, leaf in run.module.backbone.load().named_parameters()}
    for k in (1, 2):
        assert equal(run.tree(k)["weights"], plain.tree(k)["weights"])
        trained = [plain.tree(j)["weights"] for j in range(1, k + 1)]
        for name, tensor in run.tree(k)["served"].items():
            vectors = [weights[name] - start[name] for weights in trained]
            torch.testing.assert_close(tensor, start[name] + 0.5 * all_at_once(vectors), rtol=0, atol=1e-6)
    sizes = [size_in_bytes(run.tree(k)["mitigations"].get("x", {})) for k in (1, 2)]
    assert sizes[0] == sum(4 * leaf.numel() for leaf in start.values())


def test_lora_serves_the_best_of_its_rank(llama: Path) -> None:
    """Chosen entry by entry, the change of every layer comes back as the nearest matrix of the adapter's rank (Eckart
    and Young), and the record says what that loses."""
    plain, run = two_stages(llama, "lora"), two_stages(llama, "lora", served)
    model, adapter = run.module.model, run.module.adapter
    updates = [adapter.weights(model, plain.tree(k)["weights"]) for k in (1, 2)]
    found = adapter.weights(model, run.tree(2)["served"])
    for name in found:
        whole = 0.5 * all_at_once([update[name].detach() for update in updates])
        values = torch.linalg.svdvals(whole.double())
        rank = int((torch.linalg.svdvals(found[name].double()) > 1e-6 * values[0]).sum())
        lost = float((found[name] - whole).norm())
        assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-6)
    assert run.tree(2)["facts"]["weights"]["served/truncation"] > 0


def first_stage() -> Mitigation:
    return MagMax(strength=1.0, into="train")


def the_newest() -> Mitigation:
    return TaskArithmetic(strength=0.4, last=1, first=True, into="serve")


def without_a_past() -> Mitigation:
    return MagMax(strength=0.4, past=0.0)


def test_without_a_past_it_is_task_arithmetic_of_the_newest(llama: Path) -> None:
    one, other = (two_stages(llama, "full", make) for make in (the_newest, without_a_past))
    for k in (1, 2):
        for name, tensor in one.tree(k)["served"].items():
            torch.testing.assert_close(other.tree(k)["served"][name], tensor, rtol=0, atol=1e-6)


def test_a_first_stage_at_strength_one_is_itself(llama: Path) -> None:
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", first_stage)
    for name, tensor in run.weights[0].items():
        torch.testing.assert_close(tensor, plain.weights[0][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"past": 1.1}, {"past": -0.1}, {"into": "nowhere"}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        MagMax(**options)
