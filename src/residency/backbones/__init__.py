"""Pretrained models and their tokenizers."""

from residency.backbones.base import Backbone
from residency.backbones.causal_lm import CausalLM
from residency.backbones.quantisation import Quantisation

__all__ = ["Backbone", "CausalLM", "Quantisation"]
