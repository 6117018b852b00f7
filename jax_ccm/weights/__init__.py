"""Weights and tokenizers in and out, without torch."""

from jax_ccm.weights.base import load_model as load_model
from jax_ccm.weights.base import read_config as read_config
from jax_ccm.weights.hf import save_hf as save_hf
from jax_ccm.weights.tokenizers import load_tokenizer as load_tokenizer
