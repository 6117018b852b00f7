"""Compressed context memory for pretrained language models, in JAX."""

from jax_ccm.closing import Closing as Closing
from jax_ccm.closing import prefill as prefill
from jax_ccm.errors import RunError as RunError
from jax_ccm.errors import UserError as UserError
from jax_ccm.generate import Sampling as Sampling
from jax_ccm.generate import for_decoding as for_decoding
from jax_ccm.generate import generate as generate
from jax_ccm.layout import Sizes as Sizes
from jax_ccm.layout import batch as batch
from jax_ccm.layout import chunk as chunk
from jax_ccm.layout import visible as visible
from jax_ccm.memory import check as check
from jax_ccm.memory import init_cache as init_cache
from jax_ccm.methods import METHODS as METHODS
from jax_ccm.methods import build as build
from jax_ccm.nn import AdapterConfig as AdapterConfig
from jax_ccm.nn import ModelConfig as ModelConfig
from jax_ccm.nn import Transformer as Transformer
from jax_ccm.sessions import Example as Example
from jax_ccm.sessions import Segment as Segment
from jax_ccm.steps import compress as compress
from jax_ccm.steps import compress_scan as compress_scan
from jax_ccm.steps import compress_step as compress_step
from jax_ccm.steps import parallel_forward as parallel_forward
from jax_ccm.steps import read as read
from jax_ccm.steps import repeat as repeat
from jax_ccm.types import Batch as Batch
from jax_ccm.types import Chunk as Chunk
from jax_ccm.types import Kind as Kind
from jax_ccm.types import MemoryCache as MemoryCache
from jax_ccm.types import Method as Method
from jax_ccm.types import Rule as Rule
from jax_ccm.types import Slots as Slots
from jax_ccm.types import Token as Token

__version__ = "0.1.0"
