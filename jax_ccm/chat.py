"""``python -m jax_ccm.chat ADAPTER``, or ``CONFIG.yaml --adapter PATH``: talks with a model that keeps a memory."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, open_experiment
from jax_ccm.data.template import sentence_ends
from jax_ccm.errors import UserError, require_least
from jax_ccm.memory.closing import Closing
from jax_ccm.memory.generation import Sampling
from jax_ccm.records.parsing import read_text
from jax_ccm.records.paths import Folder
from jax_ccm.sessions import typed
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.terminal import Terminal, printable
from jax_ccm.sessions.transcript import Record


@dataclasses.dataclass(frozen=True)
class Options:
    """Talks with a model that keeps a compressed memory of the conversation.

    After each turn what was said, question and answer, becomes memory, and its text is dropped: as two chunks, or with
    data.unit_of_memory: exchange as one. An empty line or Ctrl-D ends the conversation; Ctrl-C stops an answer. Give
    --say to put the turns on the command line instead. /memory shows what is remembered, /save, /load, /fork, /forget
    and /reset handle it, /compare answers the last turn from other memories, too, and /compare TEXT asks them something
    beside the conversation; /help lists them. --example True shows all this at once: nothing needs to be typed.

    A turn that cannot be answered (too long, or no room in memory) is refused: the memory stays as it was and the
    conversation goes on. Unless it is held at a terminal, the command then exits with 2 in the end, else with 0.
    """

    adapter: Folder | None = None
    """Folder or name of a trained adapter, or ORG/NAME[@REVISION] on the hub; needed where the config names none."""
    say: tuple[str, ...] = ()
    """What to say, one argument a turn; none for a conversation at the keyboard."""
    example: bool = False
    """Hold the conversation that comes with jax_ccm: twelve turns with names, a place, a number, small talk and a
    change of mind; then each fact of it is asked for, by /compare TEXT."""
    compare: bool = False
    """Also answer each turn without memory: by the same model, shown this turn alone."""
    max_tokens: int = 48
    """Most tokens of an answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are left out of it."""
    context: Folder | None = None
    """A text file that is read into the memory first, in chunks as long as a turn of the data may be."""
    system: str = ""
    """A system message with which the conversation begins, and which stays as it is beside the memory: for a model with
    a chat template, and a method with a sink."""
    load: Folder | None = None
    """A memory file (.ccm) to go on from."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """With a temperature: only the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Of the sampling."""
    span: int = 0
    """Compress question and answer while they are read and made, in spans of this many tokens (Sentinel tokens are
    trained on 2 to 25); 0 for turn by turn."""
    sentences: bool = False
    """With a span: end one with each sentence, too."""
    workdir: Folder | None = None
    """Where to write the conversation, as chat.json, turn by turn; not written if left out."""


def main() -> int:
    options, config = cli.parse(Options, command="jax_ccm.chat")
    if options.adapter is None and not config.adapter.load:
        raise UserError("there is no adapter to talk with; name it in place of the config, or give --adapter PATH")
    if options.example and options.say:
        raise UserError("--example says its own turns, and --say others; leave one of them out")
    require_least(options, "--", span=0)
    # Before the model is loaded, which takes much longer: both refuse what cannot be.
    Answering(options.max_tokens, Sampling(options.temperature, top_p=options.top_p), options.seed, options.stop)
    with open_experiment(config, adapter=options.adapter) as experiment:
        return _talk(experiment, options)


def _talk(experiment: Experiment, options: Options) -> int:
    sampling = Sampling(options.temperature, top_p=options.top_p)
    closing = None
    if options.span:
        ends = sentence_ends(experiment.tokenizer) if options.sentences and experiment.tokenizer else ()
        # A sentence of one token closes no span, unless spans have no more.
        closing = Closing(options.span, ends, shortest=min(2, options.span))
    elif options.sentences:
        raise UserError("--sentences needs --span, the most tokens of a span")
    talk = Conversations(experiment, sampling=sampling, seed=options.seed, closing=closing, stop=options.stop)
    if options.system and options.load is not None:
        raise UserError("--system begins a conversation, and --load goes on with one; leave one of them out")
    if options.system:
        talk.instruct({0: options.system})
    if options.load is not None:
        talk.load(0, options.load)
    if options.context is not None:
        talk.read({0: read_text(options.context)})
    record = Record(options.workdir)
    terminal = Terminal(
        talk, max_tokens=options.max_tokens, alone=options.compare, system=options.system, status=not options.example
    )
    print(f"{experiment.method.name} on {experiment.base_name}; {typed.ABOUT if options.example else typed.HINT}")
    for text in typed.example() if options.example else options.say or typed.lines():
        if options.example and text.startswith("/"):
            print()
        # What is typed stands on the terminal already.
        if options.say or options.example or not sys.stdin.isatty():
            print(f"you      {printable(text)}")
        entry: dict[str, Any] = {"you": text}
        try:
            _exchange(terminal, entry)
        except UserError as error:
            entry["refused"] = str(error)
            print(f"refused  {error}; the memory is as it was")
        except KeyboardInterrupt:
            # At the keyboard Ctrl-C stops the reply alone; turns that were given in advance end with it.
            if options.say or options.example:
                raise
            entry["refused"] = "interrupted"
            print("stopped  the memory is as it was before this turn")
        record.add(entry)
    # Whoever sits at a terminal has read what was refused; a script looks at the status.
    held = not (options.say or options.example) and sys.stdin.isatty()
    return 2 if record.refused and not held else 0


def _exchange(terminal: Terminal, entry: dict[str, Any]) -> None:
    """Has a turn answered, or a command done."""
    text = entry["you"]
    # Two slashes begin a turn that itself begins with one.
    if text.startswith("/") and not text.startswith("//"):
        terminal.command(text, entry)
    else:
        terminal.say(text.removeprefix("/"), entry)


if __name__ == "__main__":
    cli.run(main)
