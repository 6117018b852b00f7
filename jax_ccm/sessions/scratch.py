"""Rows in which turns are worked on, apart from what their sessions have come to, and the few programs that do it.

Text is read and closed in one row at a time, by a program that knows no row by number: what a row holds does not depend
on the others, and temporaries do not grow with the rows. Tokens are made in all rows at once, each with a start, a
limit and a sampling of its own. The cache is donated to each: nothing of its size is copied for a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.cache import check, put_row, raw_capacity, take_row
from jax_ccm.memory.closing import policy, prefill
from jax_ccm.memory.generation import Draws, proceed
from jax_ccm.nn.positions import warn_beyond
from jax_ccm.rules import rows
from jax_ccm.rules.types import MemoryCache
from jax_ccm.sessions.engine import Answering, Engine

# Text is read in pieces padded to one of these sizes, each a program: what is made in other rows waits for one piece.
PIECES = (8, 32, 64, 128)
# Most tokens that are made at a time: an interrupt waits for so many.
AT_A_TIME = 8


@dataclasses.dataclass(frozen=True)
class Want:
    """Tokens that a row wants.

    Attributes:
      how: its answer is made.
      number: of the turn of its session, so that each draws other tokens.
      start: tokens of the answer so far.
      limit: most tokens now.
    """

    how: Answering
    number: int
    start: int
    limit: int


@dataclasses.dataclass(frozen=True)
class Made:
    """Tokens that a row has got.

    Attributes:
      tokens: int32.
      ended: whether they are fewer than it wanted: what ends an answer came behind them.
      logprobs: each with its log-probability and, from the likeliest on, the most likely tokens with theirs; none if
        nobody asked for them.
    """

    tokens: np.ndarray
    ended: bool
    logprobs: list[tuple[int, float, list[tuple[int, float]]]]


class Scratch:
    """As many rows as the sessions have, each for one turn at a time."""

    def __init__(self, engine: Engine):
        """Nothing is allocated before there is a turn."""
        self.engine = engine
        self._cache: MemoryCache | None = None
        self._owners: dict[int, object] = {}

    @property
    def cache(self) -> MemoryCache:
        """All rows."""
        if self._cache is None:
            self._cache = self.engine.empty()
        return self._cache

    def claim(self, row: int, owner: object) -> None:
        """Takes a row. Raises as `require_idle`."""
        self.require_idle(row)
        self._owners[row] = owner

    def require_idle(self, row: int) -> None:
        """Refuses a row that is taken.

        Raises:
          UserError: if its session is in the middle of a turn.
        """
        if row in self._owners:
            raise UserError(f"session {row} is in the middle of a turn; wait for its end, or give it up")

    def lose(self) -> None:
        """Takes all rows from all: their turns are interrupted."""
        self._owners.clear()

    def release(self, row: int, owner: object) -> None:
        """Gives a row back."""
        if self.owns(row, owner):
            del self._owners[row]

    def owns(self, row: int, owner: object) -> bool:
        """Whether a row is still somebody's: an interrupted program takes all rows from all."""
        return self._owners.get(row) is owner

    def put(self, row: int, one: MemoryCache) -> None:
        """Makes a row a copy of a session (`take_row`)."""
        self._run(_put, one, np.int32(row))

    def take(self, row: int) -> MemoryCache:
        """A copy of a row."""
        return take(self.cache, np.int32(row))

    def read(self, row: int, piece: np.ndarray, *, query: bool, keep: bool = False) -> None:
        """Reads int32 tokens into a row, up to the largest of `PIECES`; ``keep``: they are never compressed."""
        experiment, closing = self.engine.experiment, self.engine.closing
        # Padded to one of few sizes: each size is a program of its own.
        size = next(size for size in PIECES if size >= len(piece))
        if experiment.method.chunk is None and closing is None:
            # `read` refuses a chunk, padding and all, beyond the slots of raw text. Text that is closed on the way is
            # cut inside the program, and may be longer.
            size = min(size, raw_capacity(self.cache))
        chunk = rows.chunk([piece.tolist()], size, experiment.model_config.vocab_size)
        if keep:
            chunk = dataclasses.replace(chunk, kept=chunk.valid)
        program, method = reading(jax.default_backend()), experiment.method
        self._run(program, np.int32(row), self.engine.decoder, chunk, method=method, query=query, closing=closing)

    def close(self, row: int) -> None:
        """Makes the open text of a row memory."""
        self._run(_close, np.int32(row), self.engine.experiment.model, method=self.engine.experiment.method)

    def make(self, wants: Mapping[int, Want]) -> dict[int, Made]:
        """Makes tokens in some rows, up to `AT_A_TIME` each."""
        engine = self.engine
        method, nobody = engine.experiment.method, Want(Answering(), 0, 0, 0)
        # Rows that want nothing have a limit of 0, and stay as they are.
        each = [wants.get(row, nobody) for row in range(engine.rows)]

        def array(kind, value):
            return np.asarray([value(want) for want in each], kind)

        closing, query = policy(method, engine.closing, query=True)
        drawn, reached = self._run(
            _make,
            engine.decoder,
            array(np.uint32, lambda want: want.how.seed % 2**32),  # any whole number is one
            array(np.uint32, lambda want: want.number),
            Draws(
                keys=None,
                temperature=array(np.float32, lambda want: want.how.sampling.temperature),
                top_k=array(np.int32, lambda want: want.how.sampling.top_k),
                top_p=array(np.float32, lambda want: want.how.sampling.top_p),
                start=array(np.int32, lambda want: want.start),
                limit=array(np.int32, lambda want: min(want.limit, AT_A_TIME)),
                told=array(bool, lambda want: want.how.logprobs is not None),
                # -1 is no token's id: for a model in which no token ends an answer.
                stops=np.asarray(engine.stops or [-1], np.int32),
            ),
            method=method,
            max_tokens=AT_A_TIME,
            closing=closing,
            query=query,
            # Rows of the head that the tokenizer does not know are never drawn.
            vocabulary=len(engine.experiment.tokenizer),
        )
        # One transfer for all of it.
        drawn, reached = jax.device_get((drawn, reached))
        most = int(reached[list(wants)].max())
        warn_beyond(engine.experiment.model_config, method, tokens=most, slots=self.cache.slots.kind.shape[1])
        made = {}
        for row, want in wants.items():
            count, best = int(drawn.lengths[row]), want.how.logprobs
            ids, logprobs = drawn.tokens[row, :count], drawn.logprobs[row]

            # Bound as defaults: the closure would see the last row of the loop.
            def top(i, row=row, best=best):
                return list(
                    zip(
                        drawn.top_tokens[row, i, :best].tolist(),
                        drawn.top_logprobs[row, i, :best].tolist(),
                        strict=True,
                    )
                )

            told = [] if best is None else [(int(ids[i]), float(logprobs[i]), top(i)) for i in range(count)]
            # Fewer than were wanted: a token that ends the answer stood behind them, or the row is spoiled (`check`).
            made[row] = Made(ids, count < min(want.limit, AT_A_TIME), told)
        return made

    def check(self, row: int) -> None:
        """Refuses a row that lost something for want of room, or is spoiled; as `jax_ccm.memory.cache.check`."""
        check(self.cache, self.mask([row]))

    def chunks(self, row: int) -> int:
        """How many chunks a row has closed."""
        return int(np.asarray(self.cache.chunks)[row])

    def mask(self, wanted) -> np.ndarray:
        """``bool [B]``, true in some rows."""
        return np.isin(np.arange(self.engine.rows), list(wanted))

    def _run(self, program: Callable[..., Any], *given: Any, **static: Any) -> Any:
        """What a program makes of the cache, and what else it returns.

        The cache is gone until the program has returned: if it does not, all turns that were worked on are.
        """
        # Donated: from the call on these arrays belong to the program, whether it returns or not.
        cache, self._cache = self.cache, None
        try:
            found = program(cache, *given, **static)
            self._cache, other = found if isinstance(found, tuple) else (found, None)
        finally:
            if self._cache is None:
                self.lose()
        return other


take = jax.jit(take_row)
_put = jax.jit(put_row, donate_argnums=0)


def _read_row(cache, row, model, chunk, *, method, query, closing):
    # One row in and out: the forward pass works on `[1, ...]`, whatever B is.
    one = prefill(model, take_row(cache, row), chunk, method=method, query=query, closing=closing)
    return put_row(cache, one, row)


def _close_row(cache, row, model, *, method):
    return put_row(cache, steps.compress(model, take_row(cache, row), method=method), row)


def _make_rows(cache, model, seeds, numbers, draws, *, method, max_tokens, closing, query, vocabulary):
    # [B]: by seed and number of the turn, and by nothing of the row or its neighbours.
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
    draws = dataclasses.replace(draws, keys=keys)
    static = dict(method=method, max_tokens=max_tokens, closing=closing, query=query, vocabulary=vocabulary)
    cache, drawn = proceed(model, cache, draws, **static)
    return cache, (drawn, cache.next_position)


@functools.cache
def reading(platform: str):
    """The program that reads, for a platform as jax names it. On a CPU LLVM does less for it.

    All layers may stand in it side by side (`Transformer.unstacked`), and its time goes into matrix products, which
    LLVM does not make: so it is there in less than half of the time, and about as fast.
    """
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    names = ("method", "query", "closing")
    return jax.jit(_read_row, donate_argnums=0, static_argnames=names, compiler_options=options)


_close = jax.jit(_close_row, donate_argnums=0, static_argnames="method")
_make = jax.jit(
    _make_rows, donate_argnums=0, static_argnames=("method", "max_tokens", "closing", "query", "vocabulary")
)
