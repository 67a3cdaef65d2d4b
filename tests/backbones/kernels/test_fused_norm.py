"""RMS norms in fewer passes: only where it is the same function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from residency.backbones.kernels.norm import fuse_norms, rms_norm


class ShiftedRMSNorm(nn.Module):
    """Named and parametrised like Llama's; epsilon is outside of the root."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-2

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + 1e-2)


def test_only_what_computes_the_same_is_replaced() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"llama": LlamaRMSNorm(16), "gemma": GemmaRMSNorm(16), "shifted": ShiftedRMSNorm(16), "torch": nn.RMSNorm(16)}
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0)
    x = torch.randn(3, 5, 16)
    before = {name: norm(x) for name, norm in model.items()}
    assert fuse_norms(model) == 1
    assert {name for name, norm in model.items() if "forward" in vars(norm)} == {"llama"}
    for name, norm in model.items():
        torch.testing.assert_close(norm(x), before[name], rtol=0, atol=1e-6)


def test_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    plain, fused = LlamaRMSNorm(8), LlamaRMSNorm(8)
    fuse_norms(nn.ModuleList([fused]))
    x = torch.randn(4, 8, requires_grad=True)
    wanted, found = (torch.autograd.grad(norm(x).sin().sum(), [x, norm.weight]) for norm in (plain, fused))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_own_rounding() -> None:
    norm = LlamaRMSNorm(8).bfloat16()
    assert fuse_norms(nn.ModuleList([norm])) == 0
    norm = LlamaRMSNorm(8)
    fuse_norms(nn.ModuleList([norm]))
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(norm(x), LlamaRMSNorm(8)(x))


def test_both_gradients_are_those_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, 3, 7), (7,)))
    x[0, 0] *= 1e-4
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), nn.functional.rms_norm(x, (7,), weight, 1e-5))
    frozen = rms_norm(x, weight, 1e-5)
    assert torch.equal(frozen, rms_norm(x.requires_grad_(), weight.requires_grad_(), 1e-5))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), [x, weight])
