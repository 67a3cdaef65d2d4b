"""Loading, running and naming a backbone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from residency.adapters import Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM, Quantisation
from residency.backbones.work import is_checkpointed
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, untyped
from residency.testing.tiny_runs import make_module, train

EXAMPLES = [
    Example.of(domain="x", row=str(i), prompt=tuple(range(3, 8 + i)), completion=(20 + i, 30, 0)) for i in range(4)
]


def test_fingerprint_follows_weights_tokenizer_dtype_and_quantisation(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    base = CausalLM(path=str(llama)).fingerprint()
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert CausalLM(path=str(copy)).fingerprint() == base, "where a model lies is not what it is"
    assert CausalLM(path=str(gpt2)).fingerprint()["weights"] != base["weights"]
    assert CausalLM(path=str(llama), dtype="bfloat16").fingerprint() != base
    assert CausalLM(path=str(llama), quantisation=Quantisation()).fingerprint() != base
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert CausalLM(path=str(copy)).fingerprint()["weights"] != base["weights"]


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "~/no-such-folder"])
def test_missing_folder_is_told(path: str) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        CausalLM(path=path).load()


def test_unreachable_hub_id_is_told() -> None:
    with pytest.raises(UserError, match="cannot get the model 'nobody/nothing'"):
        CausalLM(path="nobody/nothing").load()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtype(llama: Path, dtype: str) -> None:
    model = CausalLM(path=str(llama), dtype=dtype).load()  # type: ignore[arg-type]
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training


def test_gradient_checkpointing_changes_memory_not_gradients(llama: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = CausalLM(path=str(llama), gradient_checkpointing=checkpointing)
        model = Full().attach(backbone.load()).train()
        assert is_checkpointed(model) == model.is_activation_checkpointing == checkpointing
        backbone.logits(model, make_batch(EXAMPLES, layout="packed")).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_base_trains_its_adapter_and_survives_evaluation(kind: str, llama: Path, tmp_path: Path) -> None:
    """Evaluation between two stages must not repack the weights: the second stage still gets gradients."""
    module = make_module(llama, lora(r=4, target_modules="all-linear"), {})
    module.backbone = CausalLM(path=str(llama), quantisation=Quantisation(kind=kind))  # type: ignore[arg-type]
    module.build(seed=0)
    frozen = {n: p.detach().clone() for n, p in module.model.named_parameters() if not p.requires_grad}
    assert any(not p.is_floating_point() for p in frozen.values()), "nothing was quantised"
    batch = make_batch(EXAMPLES, layout=module.layout)
    norms = []
    for _ in range(2):
        module.model.train()
        module.forward(batch).square().mean().backward()
        first = next(p for n, p in module.model.named_parameters() if "layers.0" in n and "lora_B" in n)
        norms.append(float(first.grad.norm()))  # type: ignore[union-attr]
        module.model.zero_grad()
        module.model.eval()
        with torch.inference_mode():
            module.forward(batch)
    assert norms[0] > 0
    assert norms[0] == norms[1]
    assert all(torch.equal(p, dict(module.model.named_parameters())[n]) for n, p in frozen.items())


def test_full_fine_tuning_of_a_quantised_base_is_refused(llama: Path) -> None:
    module = make_module(llama, Full(), {})
    module.backbone = CausalLM(path=str(llama), quantisation=Quantisation())
    with pytest.raises(UserError, match=r"lora\.yaml"):
        module.build(seed=0)


def test_gpt2_runs_a_whole_stream(gpt2: Path, tmp_path: Path) -> None:
    record, module = train(tmp_path / "run", gpt2, Full(), steps=8)
    matrix = record["scores"]["nll"]["R"]
    assert module.layout == "packed"
    assert all(matrix[k + 1][k] < matrix[0][k] for k in range(3)), "every domain is learned"


def test_a_kernel_that_is_wrong_is_left_out_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing and the other kernels stay; what counts FLOPs has seen the last layer with its kernel and without."""

    def off_by_a_tenth(model: nn.Module) -> None:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                untyped(module).forward = lambda x, own=module: 1.1 * type(own).forward(own, x)

    monkeypatch.setattr("residency.backbones.causal_lm.fuse_norms", off_by_a_tenth)
    monkeypatch.setattr("residency.backbones.verdicts.recall", lambda key: None)
    monkeypatch.setattr("residency.backbones.verdicts.remember", lambda key, verdict: None)
    backbone = CausalLM(path=str(llama))
    backbone.load()
    assert backbone.packing_problem() == ""
    assert {*backbone.left_out()} == {"norm"}
