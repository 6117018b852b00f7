"""The base model: a Llama-like decoder with a gated adapter and a memory."""

from jax_ccm.nn.config import AdapterConfig as AdapterConfig
from jax_ccm.nn.config import ModelConfig as ModelConfig
from jax_ccm.nn.config import RopeScaling as RopeScaling
from jax_ccm.nn.transformer import Transformer as Transformer
from jax_ccm.nn.transformer import abstract_transformer as abstract_transformer
