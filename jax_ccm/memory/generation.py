"""Generation from sessions, as one compiled loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import check
from jax_ccm.memory.closing import Closing, close_due, policy
from jax_ccm.memory.steps import read
from jax_ccm.nn.positions import warn_beyond
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.types import Array, Chunk, MemoryCache, Method

# Most likely tokens of which log-probabilities are told, beside that of the token that was drawn.
TOP = 20


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 for all.
      top_p: only the most likely tokens whose probabilities add up to this (nucleus; Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        # NaN is refused, too.
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature {self.temperature} and top_k {self.top_k} must be numbers from 0 on, and top_p "
                f"{self.top_p} in (0, 1]"
            )


def sample(keys, logits, temperature, top_k, top_p):
    """Draws a token from each row of logits.

    Args:
      keys: PRNG keys ``[B]``: what a row draws does not depend on the others.
      logits: ``float32 [B, V]``.
      temperature, top_k, top_p: as in `Sampling`, each for all rows or ``[B]``; arrays, so that changing them compiles
        nothing.

    Returns:
      ``int32 [B]``.
    """

    temperature, top_k, top_p = (jnp.broadcast_to(x, keys.shape)[:, None] for x in (temperature, top_k, top_p))

    def draw(logits):
        logits = logits / jnp.where(temperature > 0, temperature, 1)
        # From most to least likely.
        ranked = -jnp.sort(-logits, axis=-1)
        among = (top_k == 0) | (jnp.arange(logits.shape[-1]) < top_k)
        # Shares of the mass of those that top_k leaves, as Hugging Face has it.
        mass = jnp.cumsum(jax.nn.softmax(jnp.where(among, ranked, -jnp.inf), axis=-1), axis=-1)
        # A token stays if the mass of the more likely ones has not reached top_p; the first always stays.
        before = jnp.concatenate([jnp.zeros_like(mass[:, :1]), mass[:, :-1]], axis=-1)
        inside = (before < top_p) & among
        smallest = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
        # By value, so that tokens with the same logit as the last one inside stay, too.
        return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= smallest, logits, -jnp.inf))

    greedy = jnp.argmax(logits, axis=-1)

    def either(logits):
        return jnp.where(temperature[:, 0] > 0, draw(logits), greedy)

    # Where all rows are greedy, the sort of the whole vocabulary is not run.
    return jax.lax.cond(jnp.any(temperature > 0), either, lambda logits: greedy, logits).astype(jnp.int32)


# Layers that may be copied for the sake of speed, bytes.
UNSTACKED_BYTES = 2**31


def for_decoding(model: Transformer, cache: MemoryCache) -> Transformer:
    """The form of a decoder that makes tokens fastest here: `Transformer.unstacked`, if that pays, or as it is.

    Args:
      model: the decoder with its adapter.
      cache: the sessions that it will generate for; how large they are decides, too.
    """
    return model.unstacked() if pays_unstacked(model, cache) else model


def pays_unstacked(model: Transformer, cache: MemoryCache) -> bool:
    """Whether tokens are made faster by `Transformer.unstacked`.

    So it is on a CPU, for layers of up to 2 GiB (it takes as much memory again, and longer to compile) and a cache of
    up to half of that: attention over a larger one takes so long that nothing is gained. Where weights are of another
    type than activations it always pays.
    """
    layers = jax.tree.leaves(model.layers)
    on_cpu = all([device.platform for device in x.devices()] == ["cpu"] for x in layers)
    size = sum(x.nbytes for x in layers)
    if model.precision.params != model.precision.output:
        return on_cpu
    return on_cpu and size <= UNSTACKED_BYTES and cache.nbytes <= size / 2


def generate(
    model: Transformer,
    cache: MemoryCache,
    key=None,
    *,
    method: Method,
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    stop_tokens: Sequence[int] = (),
    rows=None,
    closing: Closing | None = None,
    vocabulary: int | None = None,
    start: int | Sequence[int] = 0,
):
    """Continues sessions from their pending logits until each has met a stop token or its limit.

    The tokens, without the stop token, are read into the sessions as they come; compress afterwards to close the turn,
    or give ``closing`` to have the answer compressed while it is made (methods with `Method.chunk` do so in any case).

    Args:
      model: the decoder with its adapter; see `for_decoding`.
      cache: sessions that have read something.
      key: PRNG key, or one for each row, ``[B]``; may be left out where the temperature is 0.
      method: the compression method.
      max_tokens: most tokens for a row, one number for all.
      sampling: how tokens are drawn; one for all rows, or B.
      stop_tokens: ids that end a row.
      rows: ``bool [B]``, the rows to continue; None for all.
      closing: where the answer is closed while it is made; None leaves it open.
      vocabulary: ids from this on are never drawn: rows of the head that the tokenizer does not know. None for V.
      start: how many tokens were drawn with these keys before, for all rows or ``[B]``, so that an answer in pieces is
        the same as in one.

    Returns:
      The cache; tokens ``int32 [B, max_tokens]``, 0 behind the end; lengths ``int32 [B]``.

    Raises:
      UserError: if a session has read nothing yet or is invalid (`cache.check`), there is no room for the tokens,
        what comes out is not finite, or the method cannot close. Sessions that are not continued may be invalid.
    """
    closing, query = policy(method, closing, query=True)
    batch = cache.tokens.shape[0]
    each = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != batch:
        raise UserError(f"there are {len(each)} samplings for {batch} sessions; give one for all, or one for each")
    if key is None:
        if hottest := max(x.temperature for x in each):
            raise UserError(f"temperature {hottest} needs a PRNG key: pass key=jax.random.key(seed)")
        # Nothing is drawn from it: at temperature 0 sampling takes the largest logit.
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        # Of `jax.random.PRNGKey`: numbers, whose last axis is the key itself.
        key = jax.random.wrap_key_data(key)
    keys = key if key.ndim else jax.random.split(key, batch)
    rows = np.ones(cache.tokens.shape[0], bool) if rows is None else np.asarray(rows)
    check(cache, rows)
    empty = np.flatnonzero(rows & (np.asarray(cache.tokens) == 0))
    if len(empty):
        raise UserError(f"sessions {empty.tolist()} have read nothing; read a prompt (or a start token) first")
    draws = Draws(
        keys,
        jnp.asarray([x.temperature for x in each], jnp.float32),
        jnp.asarray([x.top_k for x in each], jnp.int32),
        jnp.asarray([x.top_p for x in each], jnp.float32),
        jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,)),
        jnp.where(rows, max_tokens, 0).astype(jnp.int32),
        jnp.zeros(batch, bool),
        # No token has the id -1.
        jnp.asarray(list(stop_tokens) or [-1], jnp.int32),
    )
    cache, drawn = _loop(
        model, cache, draws, method=method, max_tokens=max_tokens, closing=closing, query=query, vocabulary=vocabulary
    )
    check(cache, rows)
    reached = int(np.max(np.asarray(cache.next_position)[rows], initial=0))
    warn_beyond(model.config, method, tokens=reached, slots=cache.slots.kind.shape[1])
    return cache, drawn.tokens, drawn.lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """How each row goes on, as arrays: other values compile nothing.

    Attributes:
      keys: PRNG keys ``[B]``; the i-th token of an answer is drawn with the i-th one that follows from a row's.
      temperature, top_k, top_p: ``[B]``, as in `Sampling`.
      start: ``int32 [B]``, tokens of the answer that were drawn before.
      limit: ``int32 [B]``, most tokens to draw now; 0 for a row that stays as it is.
      told: ``bool [B]``, rows whose log-probabilities are wanted.
      stops: ``int32 [N]``, ids that end a row.
    """

    keys: Array
    temperature: Array
    top_k: Array
    top_p: Array
    start: Array
    limit: Array
    told: Array
    stops: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
      tokens: ``int32 [B, T]``, without what ends a row, 0 behind the end.
      lengths: ``int32 [B]``; one below its limit has met a stop token, or its session is spoiled.
      logprobs: ``float32 [B, T]`` of the tokens as the model has them, whatever the temperature; 0 in rows that are not
        `Draws.told`.
      top_tokens: ``int32 [B, T, N]``, the `TOP` most likely ones, or all of a smaller vocabulary.
      top_logprobs: ``float32 [B, T, N]`` of these.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


def proceed(model, cache, draws, *, method, max_tokens, closing, query, vocabulary):
    """`generate` as a function of arrays, to be compiled: nothing is checked, each row has a limit of its own.

    Args:
      model: the decoder with its adapter.
      cache: the sessions; those with a limit above 0 have read something.
      draws: how each goes on.
      method: static.
      max_tokens: static, at least the largest limit.
      closing, query: static, what `policy` says.
      vocabulary: static, as for `generate`.

    Returns:
      The cache, and `Drawn`.
    """

    # Ends early once all rows are done: the number of steps is data.
    def running(state):
        step, _, _, done = state
        return (step < max_tokens) & jnp.any(~done & (step < draws.limit))

    def step(state):
        i, cache, drawn, done = state
        done = done | (i >= draws.limit)
        logits = cache.logits
        if vocabulary is not None:
            logits = jnp.where(jnp.arange(logits.shape[1]) < vocabulary, logits, -jnp.inf)
        # The largest logit is NaN if any is. A spoiled row stops: there is nothing to draw from.
        cache = dataclasses.replace(cache, spoiled=cache.spoiled | ~done & ~jnp.isfinite(jnp.max(logits, axis=1)))
        done = done | cache.spoiled
        # By the number of the token in its answer, and not by the step, so that answers made in pieces draw the same.
        now = jax.vmap(jax.random.fold_in)(draws.keys, draws.start + i)
        token = sample(now, logits, draws.temperature, draws.top_k, draws.top_p)
        done = done | jnp.any(token[:, None] == draws.stops, axis=1)
        drawn = _noted(drawn, i, token, logits, draws.told & ~done)
        # A row that is done reads nothing (not valid); 0 is what stands behind the end.
        token = jnp.where(done, 0, token)
        drawn = dataclasses.replace(drawn, tokens=drawn.tokens.at[:, i].set(token), lengths=drawn.lengths + ~done)
        chunk = Chunk(token[:, None], ~done[:, None])
        cache, _ = read(model, cache, chunk, method=method, query=query)
        cache = close_due(model, cache, token, ~done, method=method, closing=closing)
        return i + 1, cache, drawn, done

    batch, vocabulary_size = cache.logits.shape
    shape = (batch, max_tokens)
    top = (*shape, min(TOP, vocabulary_size))
    drawn = Drawn(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top, jnp.float32),
    )
    _, cache, drawn, _ = jax.lax.while_loop(running, step, (jnp.int32(0), cache, drawn, draws.limit <= 0))
    return cache, drawn


def _noted(drawn: Drawn, place, token, logits, wanted) -> Drawn:
    """With the log-probabilities of a place, if any row wants them."""

    def note(drawn):
        of_all = jax.nn.log_softmax(logits, axis=-1)
        best, which = jax.lax.top_k(of_all, drawn.top_tokens.shape[2])
        own = jnp.take_along_axis(of_all, token[:, None], axis=1)[:, 0]

        def put(old, new):
            return old.at[:, place].set(jnp.where(wanted.reshape(-1, *(1,) * (new.ndim - 1)), new, 0))

        return dataclasses.replace(
            drawn,
            logprobs=put(drawn.logprobs, own),
            top_tokens=put(drawn.top_tokens, which),
            top_logprobs=put(drawn.top_logprobs, best),
        )

    # A softmax over the vocabulary for each token, only where somebody asks for it.
    return jax.lax.cond(jnp.any(wanted), note, lambda drawn: drawn, drawn)


_loop = jax.jit(proceed, static_argnames=("method", "max_tokens", "closing", "query", "vocabulary"))
