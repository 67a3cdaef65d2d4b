"""PEFT's tuners beyond LoRA: rotations, rows that do not see each other, refusals, and `kill -9`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig

from residency.adapters import OSF, Peft
from residency.adapters.peft import lora
from residency.adapters.peft_tools.tuners import _REFUSED, _REFUSED_INITS, _REFUSED_OPTIONS
from residency.backbones.layout import choose_layout
from residency.core.errors import UserError
from support.killed_runs import Kill, in_child
from support.peft_configs import CONFIGS
from support.same_run import assert_same_run
from support.tuned_models import EXAMPLES, attach, backbone, layer, learn, logits, merged_weight, weight

ROOT = Path(__file__).parents[2]
QV = ["q_proj", "v_proj"]


# -- rotations ------------------------------------------------------------------------------------------------------

# Tuner, how far it is trained, and how nearly it is a rotation then.
ROTATIONS: dict[str, tuple[PeftConfig, float, float]] = {
    "oft, exact": (OFTConfig(target_modules=QV, oft_block_size=8, use_cayley_neumann=False), 1e-1, 1e-5),
    "oft, series": (OFTConfig(target_modules=QV, oft_block_size=8), 1e-2, 1e-3),
    "boft": (CONFIGS["boft"](), 1e-1, 1e-5),
    "hra": (CONFIGS["hra"](), 1e-1, 1e-4),
}


@pytest.mark.filterwarnings("ignore:.*CUDA extension.*", "ignore:.*boft_n_butterfly_factor.*")
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_keeps_singular_values(name: str, llama: Path) -> None:
    config, lr, tolerance = ROTATIONS[name]
    model = attach(llama, config)
    for key, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "boft_s" not in key)  # BOFT's scale of every output is no rotation
    learn(model, lr=lr)
    before, after = weight(llama), merged_weight(model)
    assert float((after - before).norm() / before.norm()) > 0.05, "it has turned"
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before), rtol=tolerance, atol=0)
    gram = [(w.T @ w, w @ w.T) for w in (before, after)]
    errors = [float((one - other).norm() / one.norm()) for one, other in zip(*gram, strict=True)]
    assert min(errors) < 3 * tolerance, "angles between rows or between columns stay"
    assert max(errors) > 0.05


@pytest.mark.parametrize(("series", "lr", "tolerance"), [(False, 1e-1, 1e-5), (True, 1e-2, 1e-3)])
def test_oft_matrices_are_orthogonal(series: bool, lr: float, tolerance: float, llama: Path) -> None:
    model = attach(llama, OFTConfig(target_modules=QV, oft_block_size=8, use_cayley_neumann=series))
    learn(model, lr=lr)
    rotation = layer(model).oft_R["default"].get_weight().detach()
    assert rotation.shape == (32, 32)
    error = float((rotation.T @ rotation - torch.eye(32)).abs().max())
    assert error < tolerance
    if series:
        learn(model, lr=1e-1)
        rotation = layer(model).oft_R["default"].get_weight().detach()
        assert float((rotation.T @ rotation - torch.eye(32)).abs().max()) > 1e-2, "the series does not hold far out"


# -- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_no_row_sees_another(name: str, llama: Path) -> None:
    """After training, too: at the start an adapter that leaks may still be the identity."""
    model = attach(llama, CONFIGS[name]())
    learn(model, lr=3e-2)
    together = logits(model)
    torch.testing.assert_close(torch.cat([logits(model, examples=[e]) for e in EXAMPLES]), together, rtol=0, atol=2e-6)
    layout, _ = choose_layout("auto", backbone(llama), model)
    assert (layout == "padded") == bool(model.active_peft_config.is_prompt_learning)
    torch.testing.assert_close(logits(model, layout), together, rtol=0, atol=2e-6)


def test_lily_is_refused_because_rows_see_each_other(llama: Path) -> None:
    config = peft.LilyConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="depends on its neighbours"):
        Peft(config=config)
    torch.manual_seed(0)
    model: Any = get_peft_model(backbone(llama).load(), config)  # type: ignore[arg-type]
    learn(model, steps=8, lr=5e-2)
    alone = torch.cat([logits(model, examples=[e]) for e in EXAMPLES])
    assert float((alone - logits(model)).abs().max()) > 1e-3


# -- refusals -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": [5],
    "arrow_config": peft.ArrowConfig(),
    "kasa_config": peft.KasaConfig(),
    "layer_replication": [(0, 2), (0, 2)],
    "monteclora_config": peft.MontecloraConfig(),
    "use_qalora": True,
    "velora_config": peft.VeloraConfig(init_type="batch_average_once"),
}


@pytest.mark.parametrize("option", _REFUSED_OPTIONS)
def test_an_option_that_cannot_work_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"LoraConfig with {option}"):
        lora(target_modules=QV, task_type="CAUSAL_LM", **{option: OPTIONS[option]})


@pytest.mark.parametrize("init", _REFUSED_INITS)
def test_an_initialisation_that_cannot_work_is_refused(init: str) -> None:
    own = {"loftq": peft.LoftQConfig, "eva": peft.EvaConfig, "corda": CordaConfig, "lora_ga": peft.LoraGAConfig}
    more = {f"{init}_config": own[init]()}
    with pytest.raises(UserError, match=f"LoraConfig with init_lora_weights {init}"):
        lora(target_modules=QV, init_lora_weights=init, **more)


def test_every_refusal_names_a_preset_that_there_is() -> None:
    fixes = [fix for _, fix in (*_REFUSED.values(), *_REFUSED_INITS.values())]
    fixes += [fix for _, _, fix in _REFUSED_OPTIONS.values()]
    named = re.findall(r"configs/[\w/]+\.yaml", " ".join(fixes))
    assert len(named) > 10
    assert all((ROOT / name).is_file() for name in named)


def test_osf_has_a_class_of_its_own() -> None:
    with pytest.raises(UserError, match=r"osf\.yaml \(residency\.adapters\.OSF\)"):
        Peft(config=peft.OSFConfig())
    assert OSF(config=peft.OSFConfig()).provides


def test_a_target_that_is_not_there_is_told(llama: Path) -> None:
    with pytest.raises(UserError, match=r"no_such_layer(.|\n)*target_modules"):
        attach(llama, LoraConfig(target_modules=["no_such_layer"]))


# -- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", *(pytest.param(n, marks=pytest.mark.pairs) for n in ("qlora", "osf"))])
def test_a_killed_run_equals_the_uninterrupted_one(name: str, llama: Path, tmp_path: Path) -> None:
    """Where the frozen part is not the pretrained weight, a new process must find the same one again."""
    kinds = {"a": "generative", "b": "label"}
    assert in_child(tmp_path / "whole", llama, name, [], kinds=kinds) == 0
    assert in_child(tmp_path / "killed", llama, name, [], Kill(stage=2, step=3), kinds=kinds) == -9
    assert in_child(tmp_path / "killed", llama, name, [], kinds=kinds) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
