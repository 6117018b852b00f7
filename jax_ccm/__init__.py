"""Compressed context memory for pretrained language models, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_ccm.errors import RunError as RunError
from jax_ccm.errors import UserError as UserError
from jax_ccm.memory.cache import check as check
from jax_ccm.memory.cache import init_cache as init_cache
from jax_ccm.memory.cache import reset as reset
from jax_ccm.memory.cache import select as select
from jax_ccm.memory.closing import Closing as Closing
from jax_ccm.memory.closing import prefill as prefill
from jax_ccm.memory.generation import Sampling as Sampling
from jax_ccm.memory.generation import for_decoding as for_decoding
from jax_ccm.memory.generation import generate as generate
from jax_ccm.memory.losses import mean_loss as mean_loss
from jax_ccm.memory.repetition import repeat as repeat
from jax_ccm.memory.steps import compress as compress
from jax_ccm.memory.steps import compress_scan as compress_scan
from jax_ccm.memory.steps import compress_step as compress_step
from jax_ccm.memory.steps import parallel_forward as parallel_forward
from jax_ccm.memory.steps import read as read
from jax_ccm.memory.steps import stream_step as stream_step
from jax_ccm.methods import METHODS as METHODS
from jax_ccm.methods import build as build
from jax_ccm.nn import AdapterConfig as AdapterConfig
from jax_ccm.nn import ModelConfig as ModelConfig
from jax_ccm.nn import Transformer as Transformer
from jax_ccm.rules.batch import Batch as Batch
from jax_ccm.rules.clauses import see as see
from jax_ccm.rules.examples import Example as Example
from jax_ccm.rules.examples import Segment as Segment
from jax_ccm.rules.rows import Sizes as Sizes
from jax_ccm.rules.rows import batch as batch
from jax_ccm.rules.rows import chunk as chunk
from jax_ccm.rules.rows import measure as measure
from jax_ccm.rules.types import Chunk as Chunk
from jax_ccm.rules.types import Clause as Clause
from jax_ccm.rules.types import Kind as Kind
from jax_ccm.rules.types import MemoryCache as MemoryCache
from jax_ccm.rules.types import Method as Method
from jax_ccm.rules.types import Rule as Rule
from jax_ccm.rules.types import Slots as Slots
from jax_ccm.rules.types import Token as Token
from jax_ccm.rules.visibility import visible as visible

if TYPE_CHECKING:
    from jax_ccm.memory.files import load as load
    from jax_ccm.memory.files import save as save
    from jax_ccm.sessions.asynchronous import AsyncConversations as AsyncConversations
    from jax_ccm.sessions.conversations import Conversations as Conversations
    from jax_ccm.sessions.pretrained import from_pretrained as from_pretrained
    from jax_ccm.weights import load_model as load_model
    from jax_ccm.weights import load_tokenizer as load_tokenizer
    from jax_ccm.weights.adapters import load_adapter as load_adapter

# What stands on configs or on files of weights is imported when it is asked for: it takes longer than all the rest.
_LATE = {
    "AsyncConversations": "jax_ccm.sessions.asynchronous",
    "Conversations": "jax_ccm.sessions.conversations",
    "from_pretrained": "jax_ccm.sessions.pretrained",
    "load": "jax_ccm.memory.files",
    "load_adapter": "jax_ccm.weights.adapters",
    "load_model": "jax_ccm.weights",
    "load_tokenizer": "jax_ccm.weights",
    "save": "jax_ccm.memory.files",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})


__version__ = "0.1.0"
