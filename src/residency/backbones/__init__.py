"""Pretrained models and their tokenizers."""

from residency.backbones.base import Backbone
from residency.backbones.causal_lm import CausalLM, Quantisation

__all__ = ["Backbone", "CausalLM", "Quantisation"]
