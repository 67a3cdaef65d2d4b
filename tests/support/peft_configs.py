"""A tiny configuration of every PEFT tuner that trains here; rows of `tests/table.py` and of the composition table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import peft
from peft import PeftConfig

__all__ = ["CONFIGS", "FAR", "IDENTITY"]

_ALL = "all-linear"
_QV = ["q_proj", "v_proj"]
_SQUARE = ["q_proj", "o_proj"]  # equal shapes, for tuners that share one matrix between layers


def _lora(**options: Any) -> Callable[[], PeftConfig]:
    return lambda: peft.LoraConfig(**{"target_modules": _QV, "r": 4, **options})


def _make(config: type[PeftConfig], **options: Any) -> Callable[[], PeftConfig]:
    return lambda: config(**options)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": _lora(target_modules=_ALL, lora_alpha=8),
    "lora_dropout": _lora(target_modules=_ALL, lora_dropout=0.2),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "orthogonal": _lora(init_lora_weights="orthogonal"),
    "mica": _lora(init_lora_weights="mica"),
    "velora": _lora(velora_config=peft.VeloraConfig(num_groups=4, init_type="random")),
    "bdlora": _lora(
        use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
    ),
    "adamss": _make(peft.AdamssConfig, target_modules=_QV, r=8, num_subspaces=2),
    "adaption_prompt": _make(peft.AdaptionPromptConfig, adapter_len=4, adapter_layers=2),
    "beft": _make(peft.BeftConfig, target_modules=["v_proj"]),
    "boft": _make(peft.BOFTConfig, target_modules=_QV, boft_block_size=4),
    "c3a": _make(peft.C3AConfig, target_modules=_QV, block_size=8, init_weights=True),
    "cartridge": _make(peft.CartridgeConfig, num_virtual_tokens=3),
    "deft": _make(peft.DeftConfig, target_modules=_QV, r=4),
    "delora": _make(peft.DeloraConfig, target_modules=_QV, r=4),
    "fourierft": _make(peft.FourierFTConfig, target_modules=_QV, n_frequency=20, init_weights=True),
    "frod": _make(peft.FrodConfig, target_modules=_SQUARE, progressbar=False),
    "glora": _make(peft.GloraConfig, target_modules=_QV, r=4),
    "gralora": _make(peft.GraloraConfig, target_modules=_QV, r=4, alpha=8),
    "hira": _make(peft.HiraConfig, target_modules=_QV, r=4),
    "hra": _make(peft.HRAConfig, target_modules=_QV, r=4),
    "ia3": _make(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": _make(peft.LNTuningConfig),
    "loha": _make(peft.LoHaConfig, target_modules=_QV, r=2),
    "lokr": _make(peft.LoKrConfig, target_modules=_QV, r=2),
    "miss": _make(peft.MissConfig, target_modules=_QV, r=4),
    "oft": _make(peft.OFTConfig, target_modules=_ALL, oft_block_size=8),
    "p_tuning": _make(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=16),
    "peanut": _make(peft.PeanutConfig, target_modules=_QV, r=4),
    "prefix_tuning": _make(peft.PrefixTuningConfig, num_virtual_tokens=3),
    "prompt_tuning": _make(peft.PromptTuningConfig, num_virtual_tokens=3),
    "psoft": _make(peft.PsoftConfig, target_modules=_QV, r=4),
    "pvera": _make(peft.PveraConfig, target_modules=_SQUARE, r=4),
    "randlora": _make(peft.RandLoraConfig, target_modules=_SQUARE, r=4, randlora_alpha=8),
    "road": _make(peft.RoadConfig, target_modules=_QV, group_size=8),
    "shira": _make(peft.ShiraConfig, target_modules=_QV, r=2),
    "supertuning": _make(peft.SupertuningConfig, target_modules=_QV, sparsity=0.9),
    "tinylora": _make(peft.TinyLoraConfig, target_modules=_QV, r=2, u=4),
    "trainable_tokens": _make(peft.TrainableTokensConfig, token_indices=[0, 63, 98, 99, 100]),
    "unilora": _make(peft.UniLoraConfig, target_modules=_QV, r=2, theta_d_length=32),
    "vblora": _make(peft.VBLoRAConfig, target_modules=_QV, r=2, num_vectors=8, vector_length=16),
    "vera": _make(peft.VeraConfig, target_modules=_SQUARE, r=4),
    "waveft": _make(peft.WaveFTConfig, target_modules=_QV, n_frequency=20),
}

# How near the attached model is to the pretrained one; every other tuner equals it bit for bit.
FAR = ("cartridge", "p_tuning", "prefix_tuning", "prompt_tuning", "unilora", "vblora")
_CLOSE = ("deft", "dora", "frod", "hra", "oft", "olora", "orthogonal", "osf", "pissa", "psoft")
IDENTITY: dict[str, Literal["close", "none"]] = dict.fromkeys(_CLOSE, "close") | dict.fromkeys(FAR, "none")
