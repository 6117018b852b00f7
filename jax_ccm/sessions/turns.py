"""Turns that are answered side by side: each joins, goes on and leaves by itself, between the tokens of the others."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.rules.types import MemoryCache
from jax_ccm.sessions.engine import NOTHING, Answering, Engine
from jax_ccm.sessions.scratch import PIECES, Made, Scratch, Want

# Each step says how many tokens are wanted, 0 for none, and is sent them.
Steps = Generator[int, Made, None]


@dataclasses.dataclass(frozen=True)
class Logprob:
    """How likely a token of an answer was to the model.

    Attributes:
      token: as text.
      bytes: of which it is made; None where the tokenizer does not say.
      value: its log-probability.
      top: the most likely tokens at its place, from the likeliest on.
    """

    token: str
    bytes: tuple[int, ...] | None
    value: float
    top: tuple[Logprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer, as far as it is made.

    Attributes:
      text: of it.
      tokens: of which it is made.
      read: tokens that were read for it: the turn and the turns that were told before it, with what stands around them
        and opens the answer.
      known: text tokens that the session had read before.
      ended: "stop" (a token or text that ends it, or nothing was asked), "length" (its limit), or empty while it goes
        on.
      logprobs: of its tokens, if they were asked for.
    """

    text: str
    tokens: int
    read: int
    known: int
    ended: str = ""
    logprobs: tuple[Logprob, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What becomes memory.

    Attributes:
      chunks: int32 tokens, each closed by itself.
      turn: whether it is a turn of the user's, and its answer; otherwise a text.
      stays: whether it becomes no memory but stays as it is: a system message.
    """

    chunks: Sequence[np.ndarray]
    turn: bool = True
    stays: bool = False

    @classmethod
    def instructing(cls, engine: Engine, system: str) -> Exchange:
        """A system message. Raises as `Engine.instruction`."""
        return cls([engine.instruction(system)], turn=False, stays=True)


class Turn:
    """What is read into a session and, if something is asked, answered; in a row of a scratch until it is kept.

    Attributes:
      row: of the session.
      exchanges: what has become memory so far, each with the numbers of the first chunk and the one behind the last.
      said: int32, all text so far; only for methods that compress all of it anew.
      made: int32 tokens of the answer.
      wants: how many tokens it waits for; 0 while it reads, closes, or is over.
      over: whether there is nothing left to do.
      refused: why it cannot be done; None if it can.
    """

    def __init__(
        self,
        scratch: Scratch,
        row: int,
        start: Callable[[], MemoryCache],
        *,
        known: int = 0,
        number: int = 0,
        said: np.ndarray = NOTHING,
        told: Sequence[Exchange] = (),
        text: str | None = None,
        how: Answering = Answering(),
        shorter: bool = False,
        keeps: bool = True,
    ):
        """Nothing is done before `go_on`.

        Args:
          scratch: where it is worked on.
          row: of the session.
          start: gives the session as it was.
          known: text tokens that it has read.
          number: of its turns.
          said: all text so far.
          told: what it reads first.
          text: what is asked; None for nothing.
          how: the answer is made.
          shorter: whether the answer may be made shorter than ``how`` says, where there is no room for so much.
          keeps: whether question and answer become memory.

        Raises:
          UserError: if there is nothing to read in the text.
        """
        self.scratch, self.row, self.how = scratch, row, how
        self.said, self.exchanges, self.refused = said, [], None
        self.wants, self.over, self.read = 0, False, sum(len(chunk) for part in told for chunk in part.chunks)
        self._known, self._start, self._told, self._shorter, self._keeps = known, start, told, shorter, keeps
        self._number = number + sum(part.turn for part in told)
        engine = scratch.engine
        self.made, self._logprobs, self._ended = NOTHING, [], ""
        self._spoken = engine.spoken()
        # `first` is told what is read before the question, too: only the very first text of a session begins one.
        self._question = None if text is None else engine.question(text, first=not known + self.read)
        self._steps = self._go()

    @property
    def reply(self) -> Reply:
        """The answer so far."""
        engine, opened = self.scratch.engine, 0
        if self._question is not None:
            opened = len(self._question) + len(engine.template.answer)
        told = None if self.how.logprobs is None else tuple(self._logprobs)
        return Reply(self._spoken.text.strip(), len(self.made), self.read + opened, self._known, self._ended, told)

    @property
    def text(self) -> str:
        """The part of the answer that will stay as it is."""
        text = self.reply.text
        return text if self._ended else self.how.sure(text)

    def want(self, most: int) -> Want:
        """The tokens that it waits for, up to so many."""
        return Want(self.how, self._number, len(self.made), min(self.wants, most))

    def go_on(self, made: Made | None = None) -> None:
        """Reads or closes one piece, or takes the tokens that it waited for."""
        try:
            # Before each piece: rows are taken from all turns when a program fails.
            if not self.scratch.owns(self.row, self):
                raise interrupted(self.row)
            self.wants = next(self._steps) if made is None else self._steps.send(made)
        except StopIteration:
            self.wants, self.over = 0, True
        except Exception as e:
            self.wants, self.over, self.refused = 0, True, e

    def _go(self) -> Steps:
        self._begin()
        for part in self._told:
            yield from self._absorb(part)
        if self._question is not None:
            if self._told:
                # If the question must be read anew, it is from behind what was told, not from where the session was.
                told = self.scratch.take(self.row)
                self._start = lambda: told
            yield from self._answer(self._question, self.scratch.chunks(self.row))
        self._ended = self._ended or "stop"
        self.scratch.check(self.row)

    def _answer(self, question: np.ndarray, first: int) -> Steps:
        """Makes the answer, and then memory of both; ``first`` is the number of their first chunk."""
        engine = self.scratch.engine
        method, opened = engine.experiment.method, np.concatenate([question, engine.template.answer])
        held = engine.held(self._start())
        room = engine.room_after(len(opened) + held)
        if self._shorter and room is not None and 1 <= room < self.how.max_tokens:
            self.how = dataclasses.replace(self.how, max_tokens=room)
        if method.context == "joined":
            engine.require_room(len(self.said) + len(opened) + self.how.max_tokens)
        engine.require_fit(len(opened), self.how.max_tokens, held)
        # The answer sees its question and nothing else, whatever the session has read.
        if method.context == "dropped":
            self._start = lambda: engine.nobody
            self._begin()
        yield from self._read(opened, query=True)
        cut = False
        while not self._ended:
            made = yield self.how.max_tokens - len(self.made)
            # After each make: a row without room, or with numbers that are not finite, must not go on.
            self.scratch.check(self.row)
            cut = self._take(made)
        if self._keeps:
            yield from self._remember(question, opened, first, cut)

    def _take(self, made: Made) -> bool:
        """Takes tokens into the answer; whether a text has ended it, so that more was read than what counts."""
        engine = self.scratch.engine
        self.made = np.concatenate([self.made, made.tokens])
        self._logprobs += [_logprob(engine, *each) for each in made.logprobs]
        self._spoken.go_on(self.made)
        end = self._spoken.stopped(self.made, self.how.stop)
        if end is not None:
            self.made = self.made[:end]
            self._spoken = engine.spoken(self.made)
            del self._logprobs[end:]
        if len(self.made) == self.how.max_tokens:
            self._ended = "length"
        elif made.ended or end is not None:
            self._ended = "stop"
        return end is not None

    def _remember(self, question: np.ndarray, opened: np.ndarray, first: int, cut: bool) -> Steps:
        """Closes question and answer as training does; where the answer saw something else, both are read again."""
        engine = self.scratch.engine
        method, chunks = engine.experiment.method, engine.chunks(question, self.made)
        rest = NOTHING if method.context == "dropped" else engine.behind(question, self.made, chunks)
        # What was made cannot be closed as it stands: back to where the session was, and read as training lays it out.
        if method.context == "joined" or rest is None and engine.closing is None:
            self._begin()
            yield from self._absorb(Exchange(chunks))
            return
        # The row has read tokens behind the stop text; these count for nothing and must not become memory.
        if cut:
            self._begin()
            yield from self._read(np.concatenate([opened, self.made]), query=True)
        if rest is not None:
            yield from self._read(rest)
        yield from self._close()
        self._note(Exchange(chunks), first)

    def _absorb(self, part: Exchange) -> Steps:
        """Reads chunks as context, and closes each."""
        engine, first = self.scratch.engine, self.scratch.chunks(self.row)
        chunks = part.chunks
        if engine.experiment.method.context == "joined":
            # All that was said is one chunk.
            chunks, first = [np.concatenate([self.said, *chunks])], 0
            engine.require_room(len(chunks[0]))
            # The one chunk holds what was said before, too: it is compressed from an empty session.
            self.scratch.put(self.row, engine.nobody)
        for chunk in chunks:
            engine.require_fit(len(chunk), 0, engine.held(self.scratch.take(self.row)))
            # A system message is marked as kept, and never closed.
            yield from self._read(chunk, keep=part.stays)
            if not part.stays:
                yield from self._close()
        self._note(part, first)

    def _note(self, part: Exchange, first: int) -> None:
        """Notes what has become memory."""
        self.exchanges.append((part, (first, self.scratch.chunks(self.row))))
        if self.scratch.engine.experiment.method.context == "joined":
            self.said = np.concatenate([self.said, *part.chunks])

    def _begin(self) -> None:
        self.scratch.put(self.row, self._start())

    def _read(self, tokens: np.ndarray, *, query: bool = False, keep: bool = False) -> Steps:
        for at in range(0, len(tokens), PIECES[-1]):
            self.scratch.read(self.row, tokens[at : at + PIECES[-1]], query=query, keep=keep)
            yield 0

    def _close(self) -> Steps:
        # A method that cuts text itself has compressed what was full already.
        if not self.scratch.engine.experiment.method.chunk:
            self.scratch.close(self.row)
            yield 0


class Turns:
    """Turns that are worked on side by side.

    Each step does one piece of reading or closing, for one turn after the other, and makes tokens for all that wait for
    them: a long text keeps nobody waiting for longer than a piece takes. Where many turns have something to read it is
    a piece of a quarter of them: tokens cost nearly as much for few rows as for all.

    Attributes:
      running: by row; those that are over, too, until they leave.
    """

    def __init__(self, scratch: Scratch):
        """Nobody is there yet."""
        self.scratch = scratch
        self.running: OrderedDict[int, Turn] = OrderedDict()

    def join(self, turn: Turn) -> None:
        """Takes a turn on.

        Raises:
          UserError: if its session is in the middle of another one.
        """
        self.scratch.claim(turn.row, turn)
        self.running[turn.row] = turn

    def leave(self, row: int) -> None:
        """Ends a turn, whether it is over or not; its session is as it was, unless the turn was kept before."""
        turn = self.running.pop(row, None)
        if turn is not None:
            self.scratch.release(row, turn)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return all(turn.over for turn in list(self.running.values()))

    def step(self, most: int = 1) -> set[int]:
        """Goes on with all turns by a little.

        Args:
          most: most tokens that each is given at a time, up to `AT_A_TIME`, while nobody reads.

        Returns:
          The rows whose answers have grown, or whose turns are over.
        """
        moved = set()
        running = list(self.running.values())  # the collector may end a stream that was given up at any time
        reading = [turn for turn in running if not turn.over and not turn.wants]
        for turn in reading[: max(len(reading) // 4, 1)]:
            if self.running.get(turn.row) is not turn:
                continue
            # To the end of the order, so that the next step reads for others.
            self.running.move_to_end(turn.row)
            turn.go_on()
            if turn.over:
                moved.add(turn.row)
        # While somebody reads, a step makes one token at a time: those who read wait for no more than that.
        if reading:
            most = 1
        making = {turn.row: turn for turn in running if turn.wants}
        if making:
            # One program makes the next tokens of all rows that wait for some.
            made = self.scratch.make({row: turn.want(most) for row, turn in making.items()})
            for row, turn in making.items():
                turn.go_on(made[row])
        return moved | set(making)


def interrupted(row: int) -> UserError:
    """The error for a turn whose row of the scratch was lost."""
    return UserError(f"the turn of session {row} was interrupted; say it again")


def _logprob(engine: Engine, token: int, value: float, top: Sequence[tuple[int, float]]) -> Logprob:
    text = engine.experiment.tokenizer.decode([token])
    # A token that is part of a character has no bytes that decoding could tell.
    spelled = None if "\ufffd" in text else tuple(text.encode())
    return Logprob(text, spelled, value, tuple(_logprob(engine, *each, ()) for each in top))
