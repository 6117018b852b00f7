"""Replies that are generated, and how far they say what was to be answered.

Texts are compared as SQuAD does (Rajpurkar et al. 2016, section 4 and the official script, ``evaluate-v1.1.py``): lower
case, without ASCII punctuation, without the articles a, an and the, white space as one blank. Then there are

* exact: the reply is the answer;
* F1: of the words of both, as multisets;
* contains: the words of the answer stand in the reply, one behind the other. This one is ours: a model that chats
  answers in sentences, which neither of the others forgives.

Exact and F1 are the best over the record's target and its short ``answers``; contains looks for one of the short
answers, or for the target where a record gives none.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import string
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jax_ccm.data.config import DataConfig
from jax_ccm.data.questions import Choice
from jax_ccm.data.template import Template
from jax_ccm.errors import UserError
from jax_ccm.evals.recurrent import behind_contexts, fit
from jax_ccm.evals.scoring import Store, once
from jax_ccm.memory.closing import prefill
from jax_ccm.memory.generation import Sampling, for_decoding, generate
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Method

MEASURES = ("exact", "f1", "contains")
# Tokens between two looks at whether a text has come up that ends a reply.
AT_A_TIME = 16
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class Asking:
    """How replies are made: greedily.

    Attributes:
      max_tokens: most tokens of one.
      stops: ids of the tokens that end one, and are no part of it.
      until: a text that ends one as well; "" for none.
      vocabulary: ids from this on are never drawn.
      decode: from token ids to text.
      around: how many tokens of the template stand before a question, and between it and its answer.
    """

    max_tokens: int
    stops: tuple[int, ...]
    until: str
    vocabulary: int
    decode: Callable[[Sequence[int]], str]
    around: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls, data: DataConfig, tokenizer: Any, template: Template | None, ends: Sequence[int], max_tokens: int
    ) -> Asking | None:
        """How replies are made in some data, or None for ``max_tokens`` 0.

        Args:
          data: the data config, whose separator is what another turn begins with.
          tokenizer: a fast tokenizer of transformers.
          template: what sessions are put together with.
          ends: ids of the tokens that end a reply.
          max_tokens: most tokens of one.
        """
        if not max_tokens:
            return None
        assert template is not None
        # A chat template ends a turn by a token; without one a model goes on with the text that separates turns.
        until = "" if data.writes_messages else data.fixed_texts().get("separator", "").strip()
        around = len(template.heads["user"]), len(template.answer)
        return cls(max_tokens, tuple(ends), until, len(tokenizer), tokenizer.decode, around)

    def texts(self, example: Example) -> tuple[str, str]:
        """The question of a session and the answer to it, without what the template puts around them."""
        before, between = self.around
        query, target = query_and_answer(example)
        return self.decode(query[before : len(query) - between].tolist()).strip(), self.decode(target.tolist()).strip()


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a system said, and what it is worth.

    Attributes:
      text: the reply.
      tokens: how many were made.
      cut: whether it reached the limit, so that it may have gone on.
      exact, f1, contains: see the module.
    """

    text: str
    tokens: int
    cut: bool
    exact: float
    f1: float
    contains: float


def words(text: str) -> list[str]:
    """The words of a text as SQuAD compares them."""
    # In the order of the official script: an article is found behind punctuation that was taken away.
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def f1(reply: str, answer: str) -> float:
    """SQuAD's F1; where one has no words, whether both have none (as in SQuAD 2.0)."""
    said, right = words(reply), words(answer)
    common = sum((collections.Counter(said) & collections.Counter(right)).values())
    if not said or not right:
        return float(said == right)
    return 2 * common / (len(said) + len(right))


def contains(reply: str, answer: str) -> float:
    """1.0 if the words of the answer stand in the reply, one behind the other; an answer without words is in none."""
    said, right = words(reply), words(answer)
    places = range(len(said) - len(right) + 1) if right else ()
    return float(any(said[place : place + len(right)] == right for place in places))


def judge(text: str, target: str, answers: Sequence[str] = (), *, tokens: int = 0, cut: bool = False) -> Reply:
    """What a reply is worth.

    Args:
      text: the reply.
      target: the whole answer that the record gives.
      answers: its short forms; () for none.
      tokens, cut: of the `Reply`.
    """
    # The best over all answers, as SQuAD does with its several annotators.
    every = (target, *answers)
    exact = max(float(words(text) == words(one)) for one in every)
    best = max(f1(text, one) for one in every)
    # A whole sentence is hardly ever said again word for word; its short form may be.
    return Reply(text, tokens, cut, exact, best, max(contains(text, one) for one in answers or (target,)))


def prompt(example: Example) -> Example:
    """The session up to its answer.

    Raises:
      UserError: for a session that has not one answer, behind a question.
    """
    *context, tail = example.segments
    where = np.flatnonzero(tail.scored)
    # Scored tokens in one piece, and not from the first token on.
    if not len(where) or not where[0] or where[-1] - where[0] >= len(where):
        raise UserError(
            f"{example.id}: replies are generated to questions with one answer, in one piece behind the question; set "
            "eval.reply_tokens to 0 for these data"
        )
    asked, _ = query_and_answer(example)
    kept = None if tail.kept is None else tail.kept[: len(asked)]
    return dataclasses.replace(example, segments=(*context, Segment(asked, np.zeros(len(asked), bool), kept)))


def query_and_answer(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens of the tail up to its answer, and of the answer."""
    tail = example.segments[-1]
    return tail.tokens[: int(np.argmax(tail.scored))], tail.tokens[tail.scored]


def answer(
    model: Transformer,
    method: Method,
    questions: Sequence[Choice],
    asking: Asking,
    *,
    rows: int,
    capacity: int | None = None,
    store: Store | None = None,
    identity: str = "",
    log: Callable[[str], None] | None = None,
    name: str = "",
) -> list[Reply]:
    """Has every question answered; a context that several share is read once.

    Args:
      model: the decoder with its adapter.
      method: what sessions are run with.
      questions: what is asked.
      asking: how.
      rows: rows of a batch.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.
      store: where replies are kept, or None.
      identity: of the weights and the precision, for the store.
      log: takes a line on the work done.
      name: of the work, for that line.

    Returns:
      A reply to each, in the order given.
    """
    log = log or (lambda line: None)
    asked = [prompt(question.examples[question.answer]) for question in questions]
    # Whatever else decides a reply is part of its file's name in the store.
    what = f"replies of {asking.max_tokens} below {asking.vocabulary} until {asking.stops} of {capacity} slots"

    def compute() -> dict[str, np.ndarray]:
        start = time.perf_counter()
        made = continued(
            model, method, asked, max_tokens=asking.max_tokens, stops=asking.stops, vocabulary=asking.vocabulary,
            rows=rows, capacity=capacity,
        )  # fmt: skip
        log(f"{name}: {len(made):,} replies, {sum(map(len, made)):,} tokens, {time.perf_counter() - start:.0f} s")
        return {"lengths": np.array([len(x) for x in made]), "tokens": np.concatenate(made)}

    about = f"{name}: {len(asked):,} replies, made"
    known = once(store, identity, method, asked, ("lengths", "tokens"), compute, what=what, log=log, about=about)
    made = np.split(known["tokens"], np.cumsum(known["lengths"])[:-1])
    found = []
    for question, tokens in zip(questions, made, strict=True):
        _, target = asking.texts(question.examples[question.answer])
        text = asking.decode(tokens.tolist())
        whole = text.partition(asking.until)[0] if asking.until else text
        # A text that ended it was found in time, even if the limit was reached, too.
        cut = len(tokens) == asking.max_tokens and whole == text
        found.append(judge(whole.strip(), target, question.answers, tokens=len(tokens), cut=cut))
    return found


def continued(
    model: Transformer,
    method: Method,
    prompts: Sequence[Example],
    *,
    max_tokens: int,
    stops: Sequence[int],
    vocabulary: int,
    rows: int,
    capacity: int | None = None,
    ended: Callable[[np.ndarray], bool] | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[np.ndarray]:
    """What comes behind each of some sessions; a context that several share is read once.

    Args:
      model: the decoder with its adapter.
      method: what sessions are run with.
      prompts: the sessions, whose tails are read as they stand.
      max_tokens: most tokens of each.
      stops: ids of the tokens that end one, and are no part of it.
      vocabulary: ids from this on are never drawn.
      rows: rows of a batch.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.
      ended: says of the ``int32 [n]`` tokens so far whether they are enough; it is asked every `AT_A_TIME` tokens, and
        more than what it needs may come back. None makes all of them at once.
      sampling: how tokens are drawn.
      seed: of the sampling; what one session says does not depend on the others of its batch.

    Returns:
      int32 tokens for each, in the order given.
    """
    made: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    piece = max_tokens if ended is None else min(AT_A_TIME, max_tokens)
    decoder = None
    # One more: what reading the last token closes.
    room = -(-max_tokens // piece) * piece + 1
    for behind in behind_contexts(model, method, prompts, rows=rows, room=room, capacity=capacity):
        (tail,) = fit(behind.sessions.tail)
        cache = _read(model, behind.cache, tail, method=method)
        decoder = decoder or for_decoding(model, cache)
        # By the number of the example: what is drawn does not depend on where it stands in a batch.
        numbers = [*behind.numbers, *[0] * (rows - len(behind.numbers))]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(numbers))
        active = np.arange(rows) < len(behind.numbers)
        for start in range(0, max_tokens, piece):
            cache, tokens, lengths = generate(
                decoder, cache, keys, method=method, max_tokens=piece, sampling=sampling, stop_tokens=stops,
                rows=active, vocabulary=vocabulary, start=start,
            )  # fmt: skip
            tokens, lengths = np.asarray(tokens), np.asarray(lengths)
            for row in np.flatnonzero(active):
                # The last piece may go beyond the limit: all pieces are of one length, and one program.
                so_far = np.concatenate([made[numbers[row]], tokens[row, : lengths[row]]])[:max_tokens]
                made[numbers[row]] = so_far
                active[row] = lengths[row] == piece and not (ended is not None and ended(so_far))
            if not active.any():
                break
    return made


@functools.partial(jax.jit, static_argnames="method")
def _read(model: Transformer, cache: Any, chunk: Any, *, method: Method) -> Any:
    return prefill(model, cache, chunk, method=method, query=True)
