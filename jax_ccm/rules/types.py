"""The vocabulary of the library: slots, rules, methods, and the pytrees that pass between them.

Axis letters, used in every docstring and einsum of the package:

    B  batch rows (sessions)          L  layers
    T  query tokens                   N  query heads
    S  key slots of a cache           K  key/value heads
    P  tokens that write memory       G  query heads per key/value head (N = K G)
    M  memory slots                   H  head dimension
    C  tokens of a chunk              D  model dimension
    Q  scored tokens                  V  vocabulary
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, Literal

import jax
import numpy as np

from jax_ccm.rules.mixtures import EvictionPolicy, Mix

Array = Any  # a numpy array on the host, a jax array under jit
# Of int32, as all slots are; a distance is compared with it only where there is a limit (`visibility.sees`).
INF = int(np.iinfo(np.int32).max)


class Kind(enum.IntEnum):
    """What the token or cache entry in a slot is."""

    PAD = 0  # nothing: seen by nobody, a free slot of a cache
    TEXT = 1  # raw text of a context chunk
    QUERY = 2  # raw text of the tail: the input that is answered, and the answer
    COMP = 3  # a compression token while its group is being run
    OPEN = 4  # a token that marks where a span begins
    REPEAT = 5  # text that is reconstructed from memory
    SINK = 6  # the first token of a session, kept for good
    MEMORY = 7  # a key/value pair that a method wrote


# Text of every layout. A repetition, which only training lays out, is raw text, too.
TEXT = (Kind.TEXT, Kind.QUERY)
RAW = (*TEXT, Kind.REPEAT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Four integers for each place of a sequence or of a cache, ``int32 [..., S]`` each.

    Attributes:
      kind: a `Kind`.
      segment: which chunk of the session the place belongs to, from 0. For `Kind.MEMORY`
        the last chunk that went into it.
      index: order in the session; a key may be seen only from places with an equal or larger
        one (but see `Rule.both_ways`).
      position: position for RoPE. Data, never derived from a length.
    """

    kind: Array
    segment: Array
    index: Array
    position: Array

    @property
    def live(self) -> Array:
        """``bool [..., S]``: True where the place holds something."""
        return self.kind != Kind.PAD

    def map(self, fn) -> Slots:
        """Applies ``fn`` to each of the four arrays."""
        return Slots(fn(self.kind), fn(self.segment), fn(self.index), fn(self.position))


@dataclasses.dataclass(frozen=True)
class Clause:
    """One line of a rule: these kinds see those kinds, this far back.

    Attributes:
      query: kinds that look.
      key: kinds that are seen.
      nearest: smallest distance in segments, ``query.segment - key.segment``.
      farthest: largest distance in segments; `INF` for no limit.
      window: if set, only keys fewer than this many positions back, ``query.position - key.position < window``. A
        window of 1 over kinds whose positions differ is "itself".
      hidden: if set, a fraction ``(a, b)`` of what stands before the query, oldest first, that is not seen:
        ``key.position >= floor(query.position * a / b)``.
      behind: whether only keys at positions up to the query's own are seen.
    """

    query: tuple[Kind, ...]
    key: tuple[Kind, ...]
    nearest: int
    farthest: int
    window: int | None = None
    hidden: tuple[int, int] | None = None
    behind: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """Who sees whom: the union of clauses, each causal by `Slots.index`.

    Attributes:
      sees: the clauses.
      both_ways: kinds that see each other regardless of order.
    """

    sees: tuple[Clause, ...]
    both_ways: tuple[Kind, ...] = ()


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that a method runs besides the text. Its id is ``V + embedding_index``, beyond the vocabulary.

    Attributes:
      kind: a `Kind`.
      embedding_index: its embedding, in the adapter's own table. It has no row in the head.
      offset: its position, relative to that of the text token that will follow the chunk.
      from_begin: the offset counts from the chunk's first text token that is no sink instead. No position is below 0.
    """

    kind: Kind
    embedding_index: int = 0
    offset: int = 0
    from_begin: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A compression method, as data. The Transformer, the attention and the trainer read it.

    Attributes:
      name: what configs and files call it.
      rule: who sees whom.
      closes: the tokens that are run to close a chunk, in order; empty if the method compresses nothing.
      writes: kinds, of those in `closes`, whose keys and values become memory.
      pool: if set, text that no later segment sees becomes memory itself, without any token being run: the mean key
        and value of every so many tokens of a segment, in order, appended; a rest of fewer makes a slot, too.
      mix: how written keys and values enter the memory: `None` appends them as new slots, a `Mix`
        blends them slot by slot into a memory of constant size.
      groups: of a `mix`, how many mixtures there are side by side, each of `slots_per_chunk` slots: chunks enter them
        in turn, so that few chunks share one. Until each has its second chunk, nothing is mixed.
      starts_from: of tokens that write memory, the text whose mean embedding is added to their own: what this clause
        shows them; None for none.
      gate: kinds on which the adapter's LoRA acts.
      sink: how many of a session's first tokens are of kind `Kind.SINK`, which the rule lets everybody see.
      context: what training and evaluation feed before the tail: its "chunks", each closed by itself;
        all of them "joined" into one chunk; or nothing ("dropped").
      recent: closed chunks whose text stays as it is: a chunk's closing tokens are run only once so many newer chunks
        are closed. The rule says who sees that text.
      rope: keys in the cache are rotated once by their "running" position, or stored unrotated and
        rotated at each use by their place in the "cache" (streaming; recurrent only).
      chunk: if set, text is cut into chunks of just this many tokens, whatever its own boundaries, and a tail.
      repeat: in training, the token that stands for each text token of a closed chunk once more, behind it and at the
        same position, and is to be answered with that text token; None for none. Only training lays these out.
      repeat_by: whether each of these guesses by itself, all fed the same token ("placeholders", LoMA), or each but the
        first is fed the text token before it ("text"), as it is when a chunk is said again token after token.
      repeat_weight: weight of their mean loss beside that of the text.
      repeat_share: share of the training examples whose chunks are repeated, drawn at random.
      min_comp_tokens: if set, each training example closes its chunks with a random number of the tokens in `closes`,
        the first ones, from this many to all; the adapter then serves any such number.
      ratio: if set, a chunk is closed by one of the tokens in `closes` for every so many of its text tokens, the first
        ones, and by all of them at most; a rest of fewer has one, too.
      eviction: if set, closing a chunk runs no token and writes the entries that this policy selects; excludes
        `closes` and `mix`.
    """

    name: str
    rule: Rule
    closes: tuple[Token, ...] = ()
    writes: tuple[Kind, ...] = (Kind.COMP,)
    pool: int | None = None
    mix: Mix | None = None
    groups: int = 1
    starts_from: Clause | None = None
    gate: tuple[Kind, ...] = ()
    sink: int = 0
    context: Literal["chunks", "joined", "dropped"] = "chunks"
    recent: int = 0
    rope: Literal["running", "cache"] = "running"
    chunk: int | None = None
    repeat: Token | None = None
    repeat_by: Literal["placeholders", "text"] = "placeholders"
    repeat_weight: float = 1.0
    repeat_share: float = 1.0
    min_comp_tokens: int | None = None
    ratio: int | None = None
    eviction: EvictionPolicy | None = None

    def __post_init__(self):
        if self.eviction is not None and (self.closes or self.mix is not None):
            raise ValueError(f"method {self.name!r}: an eviction policy has neither closing tokens nor a mix")
        if self.groups < 1 or (self.groups > 1 and self.mix is None):
            raise ValueError(
                f"method {self.name!r}: groups={self.groups} must be at least 1, and above 1 goes with a mix"
            )
        if self.rope == "cache" and any(token.from_begin for token in self.closes):
            raise ValueError(
                f"method {self.name!r}: indices in the cache (rope='cache') have no chunk's begin to count from"
            )
        if self.recent and (self.recent < 0 or not self.closes or self.rope == "cache" or self.context != "chunks"):
            raise ValueError(
                f"method {self.name!r}: recent={self.recent} must be at least 0, and goes with tokens that close each "
                "chunk of the context and rope='running'"
            )
        if self.repeat_by not in ("placeholders", "text") or not 0 < self.repeat_share <= 1:
            raise ValueError(
                f"method {self.name!r}: repeat_by={self.repeat_by!r} must be 'placeholders' or 'text', and "
                f"repeat_share={self.repeat_share} lie in (0, 1]"
            )
        if self.starts_from is not None and not self.closes:
            raise ValueError(f"method {self.name!r}: without closing tokens nothing starts from text (starts_from)")
        unwritten = any(token.kind not in self.writes for token in self.closes)
        if self.ratio is not None and (self.ratio < 1 or not self.closes or unwritten or self.mix is not None):
            raise ValueError(
                f"method {self.name!r}: ratio={self.ratio} must be at least 1, and goes with closing tokens that all "
                "become memory, and with no mix"
            )
        if self.pool is not None and (
            self.pool < 1 or self.closes or self.mix is not None or self.eviction is not None
        ):
            raise ValueError(
                f"method {self.name!r}: pool={self.pool} must be at least 1, and goes with none of closes, mix and "
                "eviction"
            )

    def without_repetition(self) -> Method:
        """The method as it lays out rows in which nothing is repeated."""
        return self if self.repeat is None else dataclasses.replace(self, repeat=None)

    def closed_by(self, count: int | None) -> Method:
        """The method with only the first ``count`` of its closing tokens; None for all."""
        return self if count is None else dataclasses.replace(self, closes=self.closes[:count])

    def num_closing(self, tokens: Array) -> Array:
        """How many of the tokens in `closes` close chunks of so many text tokens: integers ``[...]``, for both.

        In numpy or under jit.
        """
        most = len(self.closes)
        if self.ratio is None:
            # In the shape of `tokens`.
            return most + 0 * tokens
        needed = -(-tokens // self.ratio)
        # ``min(needed, most)``, by operators that numpy and traced arrays share.
        return needed - (needed - most) * (needed > most)

    def mixing(self, mix: Mix | None, groups: int = 1) -> Method:
        """The method with mixtures for its memory, of each of which text sees the latest state; itself without one."""
        if mix is None:
            return self

        # Each looks at the newest states that there are when it looks: those of the last chunks, one in each group.
        def newest(c):
            return dataclasses.replace(c, farthest=min(c.farthest, max(c.nearest, 1) + groups - 1))

        # Clauses about anything but memory stay as they are.
        def latest(c):
            return newest(c) if Kind.MEMORY in c.key else c

        rule = dataclasses.replace(self.rule, sees=tuple(map(latest, self.rule.sees)))
        return dataclasses.replace(self, rule=rule, mix=mix, groups=groups)

    @property
    def recurrent_only(self) -> bool:
        """Whether there is no parallel form: indices in the cache and selections follow from what was read before."""
        return self.rope == "cache" or self.eviction is not None

    @property
    def remembers(self) -> bool:
        """Whether anything becomes memory."""
        return bool(self.slots_per_chunk or self.pool or self.eviction)

    @property
    def slots_per_chunk(self) -> int:
        """Memory slots that the closing tokens of a chunk write, at most (`ratio`)."""
        return sum(token.kind in self.writes for token in self.closes)

    @property
    def mixed_slots(self) -> int:
        """Memory slots that are also kept in float32, since each chunk is blended into them."""
        return self.slots_per_chunk * self.groups if self.mix is not None else 0

    @property
    def num_embeddings(self) -> int:
        """Rows of the adapter's table of embeddings."""
        return max(
            (token.embedding_index + 1 for token in (*self.closes, *([self.repeat] if self.repeat else []))), default=0
        )

    @property
    def compresses(self) -> tuple[Kind, ...]:
        """Kinds of raw text that a chunk's closing puts into memory, those that its closing tokens see beside them.

        All of them where nothing is run to close a chunk.
        """
        if not self.closes:
            return RAW
        # What the closing tokens see of their own segment, at distance 0.
        own = {token.kind for token in self.closes}
        seen = {key for c in self.rule.sees if own & set(c.query) and c.nearest <= 0 for key in c.key}
        return tuple(kind for kind in RAW if kind in seen)

    @property
    def keeps_text(self) -> bool:
        """Whether later segments go on seeing raw text that was marked as kept."""
        return any(Kind.QUERY in clause.key and clause.farthest > self.recent for clause in self.rule.sees)

    @property
    def kept_kind(self) -> Kind | None:
        """What raw text that was marked as kept is, so that later segments go on seeing it; None if there is nothing.

        Where the rule has a sink (`Kind.SINK`) and no other, only text at the very beginning of a session can be kept,
        such as a system message. Chunks of fixed length (`chunk`) leave none out.
        """
        if self.keeps_text:
            return Kind.QUERY
        sink = any(Kind.SINK in c.key and c.farthest == INF for c in self.rule.sees)
        return Kind.SINK if sink and self.chunk is None else None

    @property
    def heeds_marks(self) -> bool:
        """Whether it matters which raw text was marked as kept: later segments see that, and no other raw text."""
        return self.keeps_text and not any(Kind.TEXT in c.key and c.farthest > 0 for c in self.rule.sees)

    @property
    def forgets_text(self) -> bool:
        """Whether no closed text is seen again, and older memory as a whole or not at all.

        What a chunk's closing removes from a cache then stands last, and nothing has to move.
        """
        text = any(set(RAW) & set(clause.key) and clause.farthest > 0 for clause in self.rule.sees)
        memory = all(clause.farthest in (0, INF) for clause in self.rule.sees if Kind.MEMORY in clause.key)
        # Of several sinks one may be read when there is memory already, and stand behind it.
        replaced = self.eviction is not None or (self.mix is not None and self.groups == 1)
        return not text and (memory or (replaced and self.sink <= 1))

    @property
    def tells_queries_apart(self) -> bool:
        """Whether text that was read as a query differs from the same text read as context, at once or to later text.

        Where it does, a turn that was answered is read once more, as context, before it is closed.
        """

        def apart(kinds):
            return (Kind.TEXT in kinds) != (Kind.QUERY in kinds)

        return apart(self.gate) or any(apart(clause.query) or apart(clause.key) for clause in self.rule.sees)

    @property
    def sees_memory_in_context(self) -> bool:
        """Whether context chunks see earlier memory; if not, only the tail does (independent chunks)."""
        return any(Kind.TEXT in c.query and Kind.MEMORY in c.key for c in self.rule.sees)

    def memory_slots(self, chunks: int, tokens: int = 0) -> int:
        """Most memory slots after ``chunks`` closed chunks of up to ``tokens`` text tokens each, the sink not counted.

        The tokens matter only where text is pooled, or the slots follow from them (`ratio`).
        """
        if self.eviction is not None:
            return self.eviction.slots * (1 if self.eviction.constant else chunks)
        farthest = max((c.farthest for c in self.rule.sees if Kind.MEMORY in c.key), default=0) - self.recent
        slots = -(-tokens // self.pool) if self.pool else self.slots_per_chunk
        if self.ratio is not None and tokens:
            slots = int(self.num_closing(tokens))
        return slots * min(max(chunks - self.recent, 0), farthest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of text for each session.

    Attributes:
      tokens: ``int32 [B, C]``.
      valid: ``bool [B, C]``; False on padding, which may stand on either side. A row without a valid token stays.
      kept: ``bool [B, C]``, text that is never compressed; None for none. Methods that keep text know it
        (`Method.kept_kind`), some only at the beginning of a session.
    """

    tokens: Array
    valid: Array
    kept: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryCache:
    """The state of B sessions, of fixed shape: the carry of the recurrence. Live slots stand in front, by index.

    Attributes:
      k, v: ``[L, B, S, K, H]`` keys, rotated unless the method's `rope` is "cache", and values.
      slots: `Slots` of ``[B, S]``.
      tokens: ``int32 [B]``, text tokens read so far.
      rebased: ``int32 [B]``, by how many positions the session was moved back (`memory.rebasing`).
      chunks: ``int32 [B]``, chunks closed so far: the segment of text that is read next.
      logits: ``float32 [B, V]``, pending: they predict the token after the last text token.
      ids: ``int32 [B, S]``, the tokens of raw text, 0 elsewhere, for methods whose closing tokens start from its
        embeddings (`Method.starts_from`); None for others.
      accumulated_attention: ``float32 [L, B, S, K]``, attention that each entry has received, summed over the query
        heads of a group (`EvictionPolicy.decay`); None for methods that do not ask for it.
      mixed_k, mixed_v: ``float32 [L, B, M, K, H]``, the memory of a method that mixes, of which `k` and `v` hold the
        rounded values: each chunk is blended into these. None for other methods.
      lost: ``int32 [B]``, slots for which there was no room. Not zero: the session is invalid; `cache.check` raises.
      spoiled: ``bool [B]``, whether reading or closing gave numbers that are not finite, or text was to be kept where
        the method cannot. The session is invalid for good; `cache.check` raises.
      memory_capacity: static, most memory slots of a session; sinks have places of their own.
      overflow: static, what happens when a session's memory is full: "error", or "evict" the oldest.
    """

    k: Array
    v: Array
    slots: Slots
    tokens: Array
    rebased: Array
    chunks: Array
    logits: Array
    ids: Array | None
    accumulated_attention: Array | None
    mixed_k: Array | None
    mixed_v: Array | None
    lost: Array
    spoiled: Array
    memory_capacity: int = dataclasses.field(metadata=dict(static=True))
    overflow: Literal["error", "evict"] = dataclasses.field(default="error", metadata=dict(static=True))

    @property
    def next_position(self) -> Array:
        """``int32 [B]``, position and index of the text token that is read next."""
        return self.tokens - self.rebased

    @property
    def stored(self) -> tuple[Array, ...]:
        """What closing a chunk rewrites in each layer: keys, values and, for methods that mix, the mixtures of both."""
        return (self.k, self.v) if self.mixed_k is None else (self.k, self.v, self.mixed_k, self.mixed_v)

    def storing(self, arrays: tuple[Array, ...]) -> MemoryCache:
        """The state with other `stored` arrays."""
        return dataclasses.replace(self, **dict(zip(("k", "v", "mixed_k", "mixed_v"), arrays, strict=False)))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the state."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))
