"""Decoder layers as one node: the values and gradients of the modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residency.backbones.kernels.layers import fuse_layers
from support.small_llamas import BRANCHED, PLAIN, by_modules, nodes, run, saved, small, with_lora


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return saved(small(), tmp_path)


TUNERS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "two of them": {"target_modules": ["q_proj", "v_proj"]},
    "another rank here and there": {"rank_pattern": {"k_proj": 1, "gate_proj": 5}, "alpha_pattern": {"up_proj": 2}},
    "some layers only": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("segments", [PLAIN, BRANCHED], ids=["plain", "branched"])
@pytest.mark.parametrize("options", TUNERS.values(), ids=TUNERS)
def test_values_and_gradients_are_those_of_the_modules(model: Any, options: dict[str, Any], segments: Any) -> None:
    fused = with_lora(model, **options)
    plain = by_modules(fused)
    assert nodes(plain) == 0
    assert nodes(fused) == (1 if "layers_to_transform" in options else 2)  # behind what is trained; the last is trimmed
    weights = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    found = {}
    for name, one in (("fused", fused), ("plain", plain)):
        logits = run(one, segments)
        trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
        found[name] = logits, torch.autograd.grad((logits[0] * weights).sum(), list(trained.values()))
    torch.testing.assert_close(found["fused"], found["plain"], rtol=2e-5, atol=2e-5)


def test_gradients_are_the_derivatives(model: Any) -> None:
    """Against differences, in double precision: the node alone."""
    from residency.backbones.kernels.decoder import Norm, Parts, decoder_layer
    from residency.backbones.kernels.lora import Linear
    from residency.backbones.kernels.segments import segments_seen

    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) / 2

    shapes = [(8, 8), (4, 8), (4, 8), (8, 8), (6, 8), (6, 8), (8, 6)]
    frozen = [(drawn(*shape), drawn(shape[0])) for shape in shapes]
    trained = [drawn(*s).requires_grad_() for out, width in shapes for s in ((2, width), (out, 2))]
    norms = Norm(drawn(8), 1e-5), Norm(drawn(8), 1e-5)
    angle = drawn(5, 1, 2).repeat(1, 1, 2)

    def layer(x: Tensor, *pairs: Tensor) -> Tensor:
        ab = zip(pairs[::2], pairs[1::2], strict=True)
        linear = tuple(Linear(w, bias, a, b, 0.7) for (w, bias), (a, b) in zip(frozen, ab, strict=True))
        return decoder_layer(x, angle.cos(), angle.sin(), segments_seen(((3,), (2,))), Parts(linear, norms, 4, 0.5))

    assert torch.autograd.gradcheck(layer, (drawn(5, 8).requires_grad_(), *trained))


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return small(Qwen2Config)


def _mistral() -> Any:
    from transformers import MistralConfig

    return small(MistralConfig, sliding_window=None)


def _gelu() -> Any:
    return small(hidden_act="gelu")


def _windowed() -> Any:
    from transformers import MistralConfig

    return small(MistralConfig, sliding_window=4)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return small(Qwen3Config, head_dim=4)


def _granite() -> Any:
    from transformers import GraniteConfig

    return small(GraniteConfig, residual_multiplier=0.5, attention_multiplier=0.5)


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (small, 2),
        (_qwen2, 2),  # with biases
        (_mistral, 2),
        (_gelu, 0),
        (_windowed, 0),
        (_qwen3, 0),  # norms of queries and keys
        (_granite, 0),  # scaled sums
    ],
)
def test_architectures_are_taken_where_trying_finds_the_same(
    make: Callable[[], Any], taken: int, tmp_path: Path
) -> None:
    model = with_lora(saved(make(), tmp_path))
    assert nodes(model) == taken
    torch.testing.assert_close(run(model), run(by_modules(model)), rtol=1e-4, atol=1e-4)


def test_more_layers_are_not_taken_twice(model: Any) -> None:
    assert fuse_layers(model) == 0
    assert fuse_layers(nn.Linear(2, 2)) == 0


def test_a_copy_computes_with_its_own_weights(model: Any) -> None:
    tuned = with_lora(model)
    other = copy.deepcopy(tuned)
    before = run(tuned)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert nodes(other) == 2
    torch.testing.assert_close(run(tuned), before, rtol=0, atol=0)
    assert (run(other) - before).abs().max() > 1e-3
