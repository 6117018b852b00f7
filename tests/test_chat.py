"""Conversations: memory of constant size, the same numbers as the recurrence, clear mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_ccm import chat, methods
from jax_ccm.config.loading import Experiment
from jax_ccm.config.schema import from_mapping
from jax_ccm.data import formats
from jax_ccm.data.conversations import entities
from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.memory import steps
from jax_ccm.memory.closing import Closing
from jax_ccm.memory.generation import Sampling
from jax_ccm.rules import rows
from jax_ccm.rules.types import Kind
from jax_ccm.sessions import conversations, transcript, typed
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.turns import Turn
from tests import cases


def experiment(name="ccm_concat", unit=None, data=None, **method):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)} | {"<s>": 0, "</s>": 1}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'][0] + ':\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:\n' }}{% endif %}"
    )
    config = from_mapping({
        "method": {"name": name, **method}, "data": {"unit_of_memory": unit, **(data or {})},
        "cache": {"memory_capacity": 24, "raw_capacity": 96 if (data or {}).get("chat_template") else 64},
    })  # fmt: skip
    model = cases.model(tokens=2, vocab_size=len(tokenizer))
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    return Experiment(config, model, methods.build(name, **method), tokenizer, mesh)


class Conversation(Conversations):
    """One session, whose turns are plain texts."""

    def __init__(self, experiment, max_tokens=48, **options):
        super().__init__(experiment, **options)
        self.max_tokens = max_tokens

    def say(self, text):
        return super().say({0: text}, max_tokens=self.max_tokens)[0]

    def say_without_memory(self, text):
        return self.say_alone({0: text}, max_tokens=self.max_tokens)[0]

    cache = property(lambda self: self.state.cache)
    turns = property(lambda self: len(self.state.turns[0]))


LAID_OUT = {
    "ccm_concat": dict(comp_tokens=2, sink=True),
    "ccm_concat, independent": dict(comp_tokens=1, independent=True),
    "ccm_concat, recent": dict(comp_tokens=2, sink=True, recent=1),
    "ccm_merge": dict(comp_tokens=2),
    "sentinel": {},
    "sentinel, history": dict(history=True),
    "loma": dict(ratio=4, memory_tokens=2),
    "gist": dict(comp_tokens=2),
    "full": {},
    "window": dict(size=9),
    "none": {},
}


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("unit", ["turn", "exchange"])
@pytest.mark.parametrize("name", LAID_OUT)
def test_conversations_are_what_training_lays_out(name, unit, messages, monkeypatch):
    """Each answer is the one of the parallel forward over all turns so far, closed as the data are."""
    data = {"max_turn_tokens": 64, "chat_template": messages}
    made = experiment(name.split(",")[0], unit, data, **LAID_OUT[name])
    session, turns, examples, answers = Conversation(made, max_tokens=5), [], [], []
    remember = Turn._remember

    def noted(turn, *given):
        answers.append((turn.made, np.asarray(turn.scratch.cache.logits[0])))
        return remember(turn, *given)

    monkeypatch.setattr(Turn, "_remember", noted)
    for number, text in enumerate(("hello there", "what", "and so it goes")):
        session.say(text)
        turns += [
            (session.engine.template.later if number else session.engine.template.first)([text])[0],
            answers[-1][0],
        ]
        examples.append(
            formats.session(session.engine.template, turns, every=False, unit=formats.turns_a_chunk(made.config.data))
        )
    for logits, (tokens, after) in zip(parity.parallel_logits(made.model, made.method, examples), answers, strict=True):
        assert len(tokens)
        np.testing.assert_array_equal(logits[:-1].argmax(axis=1), tokens)
        np.testing.assert_allclose(after, logits[-1], atol=1e-5)


def test_questions_with_an_opening_of_their_own():
    """The answer is opened as in the data: by ``answer`` behind its question, else by the separator."""
    data = {"format": "online", "separator": "\nQ:", "answer": "\nA:"}
    for unit, laid in (("turn", ["<s>hi", "\nQ: x"]), ("exchange", ["<s>hi\nA: x"])):
        session = Conversation(experiment("ccm_concat", unit, data))
        template = session.engine.template
        (answer,) = template.target(["x"])
        chunks = session.engine.chunks(session.engine.question("hi", first=True), answer)
        texts = ["".join(session.engine.experiment.tokenizer.convert_ids_to_tokens(chunk)) for chunk in chunks]
        assert [text.replace("Ġ", " ").replace("Ċ", "\n") for text in texts] == laid
        context = [template.first(["hi"])[0], answer]
        example = formats.session(template, [*context, answer, answer], every=False, unit=1 + (unit == "exchange"))
        for chunk, segment in zip(chunks, rows.arrange(session.engine.experiment.method, example)[:-1], strict=True):
            np.testing.assert_array_equal(chunk, segment.tokens)


@pytest.mark.parametrize("independent", [False, True])
def test_turns_become_memory(independent):
    session = Conversation(experiment(comp_tokens=2, sink=True, independent=independent), max_tokens=6)
    for turn in range(1, 4):
        session.say("hello there")
        slots, ours, full = session.memory_bytes()
        assert slots == 1 + 4 * turn and ours == slots * cases.CONFIG.kv_bytes_per_slot(4) and full > ours
        assert not (np.asarray(session.cache.slots.kind) == Kind.QUERY).any()
    # Answers depend on what was said before, and not if the memory is left out.
    other = Conversation(experiment(comp_tokens=2, sink=True, independent=independent), max_tokens=6)
    assert other.say_without_memory("hello there") == session.say_without_memory("hello there")
    other.say("what else")
    assert np.abs(np.asarray(other.cache.v - session.cache.v)[:, 0, 1]).max() > 1e-3


def test_methods_that_cut_text_themselves():
    """LoMA compresses every full chunk, question and answer alike; what is left over stays raw across turns."""
    session = Conversation(experiment("loma", ratio=4, memory_tokens=2), max_tokens=6)
    for _ in range(2):
        session.say("hello there")
        tokens = int(session.cache.tokens[0])
        kinds = np.asarray(session.cache.slots.kind)
        assert (kinds == Kind.MEMORY).sum() == tokens // 8 * 2
        assert ((kinds == Kind.TEXT) | (kinds == Kind.QUERY)).sum() == tokens % 8
    assert tokens > 32


def test_turns_become_spans():
    """With Sentinel tokens an exchange is a span: one slot, and no text is kept."""
    session = Conversation(experiment("sentinel", "exchange"), max_tokens=6)
    for turn in range(1, 4):
        session.say("hello there")
        kinds = np.asarray(session.cache.slots.kind)
        assert (kinds == Kind.MEMORY).sum() == turn and (kinds != Kind.PAD).sum() == turn


def test_spans_within_turns():
    """Question and answer are closed while they are read and made; what is left is the turn's last span."""
    session, slots = Conversation(experiment("sentinel"), max_tokens=6, closing=Closing(4)), 0
    for _ in range(2):
        before = int(session.cache.tokens[0])
        session.say("hello there")
        slots += -(-(int(session.cache.tokens[0]) - before) // 4)
        kinds = np.asarray(session.cache.slots.kind)
        assert (kinds == Kind.MEMORY).sum() == slots == session.memory_bytes()[0]
    with pytest.raises(UserError, match="compresses chunks that saw no memory"):
        Conversation(experiment(comp_tokens=2, independent=True), closing=Closing(4))


@pytest.mark.once
def test_gist_compresses_everything_anew():
    """The memory is that of the whole conversation as one chunk; online, each turn stays by itself."""
    made = experiment("gist", comp_tokens=2)
    session = Conversation(made, max_tokens=3)
    for _ in range(2):
        session.say("hello")
    assert session.cache.tokens.tolist() == [len(session.state.said[0])] and session.cache.chunks.tolist() == [1]
    chunk = rows.chunk([session.state.said[0]], len(session.state.said[0]), made.model_config.vocab_size)
    whole = steps.compress_step(made.model, session.engine.empty(), chunk, method=made.method)
    np.testing.assert_allclose(session.cache.k, whole.k, atol=1e-5)
    assert session.memory_bytes()[0] == 2
    with pytest.raises(UserError, match="compresses the whole conversation anew .* cache.raw_capacity=64"):
        session.say("x" * 50)
    assert session.turns == 2
    session = Conversation(experiment("gist", comp_tokens=2, online=True), max_tokens=3)
    for turn in range(1, 3):
        session.say("hello")
        assert session.memory_bytes()[0] == 4 * turn


def unchanged(session, before):
    return session.state is before and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(session.cache), jax.tree.leaves(before.cache), strict=True)
    )


@pytest.mark.parametrize("name", ["ccm_concat", "gist"])
def test_a_refused_turn_changes_nothing(name):
    """Too long, empty, no text, a full memory, an interrupt: the session is as it was, and goes on."""
    session, other = (Conversation(experiment(name, comp_tokens=2), max_tokens=6) for _ in range(2))
    session.say("hello")
    other.say("hello")
    before = session.state
    for text, message in (
        ("x" * 400, "raise cache.raw_capacity|larger memory_capacity|do not fit cache.raw_capacity"),
        ("  \n", "a turn is empty"),
        ("cut \ud83d", r"the turn holds half a character \(\\ud83d at place 4\)"),
    ):
        with pytest.raises(UserError, match=message):
            session.say(text)
        assert unchanged(session, before)
    make, calls = Scratch.make, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scratch, "make", interrupted)
        patch.setattr(conversations, "AT_A_TIME", 3)
        with pytest.raises(KeyboardInterrupt):
            session.say("again")
    assert unchanged(session, before)
    assert session.say("what now") == other.say("what now")
    np.testing.assert_array_equal(session.cache.k, other.cache.k)


def test_a_full_memory_refuses_and_the_session_goes_on():
    session = Conversation(experiment(comp_tokens=2), max_tokens=6)
    for _ in range(6):
        session.say("a")
    before = session.state
    for _ in range(2):
        with pytest.raises(UserError, match="larger memory_capacity"):
            session.say("a")
        assert unchanged(session, before) and not int(session.cache.lost[0])
    assert session.say_without_memory("a") is not None


def test_a_control_token_in_a_turn_is_text():
    session = Conversation(experiment(comp_tokens=2), max_tokens=2)
    assert not {0, 1} & set(session.engine.question("use </s> to <s>stop", first=True)[1:].tolist())
    for name in ("</s>", "<s>"):
        assert not {0, 1} & set(session.engine.question(name, first=False).tolist())


TALK = """
import os, signal, sys
from pathlib import Path
import tests.conftest  # quick to compile
from jax_ccm import chat
from jax_ccm.config import cli
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.terminal import Terminal
from tests.test_chat import experiment
sys.stdout.reconfigure(encoding="ascii")
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
make, say, said = Scratch.make, Terminal.say, []
def noted(self, text, entry):
    said.append(text)
    say(self, text, entry)
def interrupted(*args, **options):
    if said[-1] == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    return make(*args, **options)
Terminal.say, Scratch.make = noted, interrupted
options = chat.Options(adapter=Path("none"), max_tokens=6, workdir=Path(sys.argv[1]))
cli.run(lambda: chat._talk(experiment("ccm_concat", comp_tokens=2), options))
"""


@pytest.mark.once
def test_one_bad_turn_does_not_end_a_conversation(tmp_path):
    """Turns that are refused, and a real interrupt, in a process of its own that reads a pipe; all are recorded."""
    turns = [b"hello", b"interrupted", b"x" * 70, b"not UTF-8: \xff", "é <s>".encode()]
    ran = subprocess.run(
        [sys.executable, "-c", TALK, str(tmp_path)], input=b"\n".join(turns) + b"\n", capture_output=True,
        cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert b"Traceback" not in ran.stderr and ran.returncode == 2, ran.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    record = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert [entry["you"] for entry in record] == [turn.decode(errors="surrogateescape") for turn in turns]
    refused = [entry.get("refused", "") for entry in record]
    assert [bool(text) for text in refused] == [False, True, True, True, False]
    assert refused[1] == "interrupted" and "raw_capacity" in refused[2] and "half a character" in refused[3]
    assert record[4]["slots"] == 8, "two exchanges were answered"


def test_the_record_grows_and_the_exit_code_tells(tmp_path, monkeypatch):
    made, seen = experiment(comp_tokens=2), []
    add = transcript.Record.add
    file = tmp_path / "new" / "chat.json"
    monkeypatch.setattr(
        transcript.Record, "add", lambda *given: add(*given) or seen.append(len(json.loads(file.read_text())))
    )
    talk = lambda *say: chat._talk(made, chat.Options(Path("none"), say=say, max_tokens=6, workdir=file.parent))
    assert talk("a", " ", "b") == 2 and seen == [1, 2, 3]
    assert "turn is empty" in json.loads(file.read_text())[1]["refused"]
    assert talk("a") == 0 and len(json.loads(file.read_text())) == 1
    # A text that is read first is memory like any other; one that is not text is refused before the talk.
    slots = json.loads(file.read_text())[0]["slots"]
    read_first = lambda context: chat._talk(
        made, chat.Options(Path("none"), say=("a",), max_tokens=6, workdir=file.parent, context=context)
    )
    (tmp_path / "notes").write_text("a few words")
    assert read_first(tmp_path / "notes") == 0 and json.loads(file.read_text())[0]["slots"] == slots + 2
    (tmp_path / "odd").write_bytes(b"\xff\xfe")
    for context, message in ((tmp_path / "none", "there is no file"), (tmp_path / "odd", "not UTF-8 text .byte 0.")):
        with pytest.raises(UserError, match=message):
            read_first(context)
    talk("a")
    # With nobody at the keyboard an interrupt ends the command; what was said before is on disk.
    exchange, before = chat._exchange, signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = lambda *given, **options: exchange(*given, **options) if given[1]["you"] != "b" else signal.raise_signal(2)
    monkeypatch.setattr(chat, "_exchange", stop)
    with pytest.raises(KeyboardInterrupt):
        talk("a", "b")
    signal.signal(signal.SIGINT, before)
    assert [entry["you"] for entry in json.loads(file.read_text())] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir .*file: .*; give a folder"):
        transcript.Record(tmp_path / "file")


@pytest.mark.once
def test_the_example_is_held(tmp_path, monkeypatch, capsys):
    """Twelve turns become memory; what is asked does not, and each answer is recorded with its bytes."""
    said = typed.example()
    turns = [text for text in said if not text.startswith("/")]
    assert said[:12] == turns and all(text.startswith("/compare ") for text in said[12:]) and len(said) == 19
    made = experiment(comp_tokens=1, data={"max_turn_tokens": 64})
    roomy = dataclasses.replace(made.config, cache=dataclasses.replace(made.config.cache, memory_capacity=64))
    made = dataclasses.replace(made, config=roomy)
    monkeypatch.setattr(sys, "stdin", None)  # nothing is read from it
    options = chat.Options(Path("none"), example=True, max_tokens=2, workdir=tmp_path)
    assert chat._talk(made, options) == 0
    shown, record = capsys.readouterr().out, json.loads((tmp_path / "chat.json").read_text())
    assert [entry["you"] for entry in record] == said and "[turn" not in shown
    assert [line.removeprefix("you      ") for line in shown.splitlines() if line.startswith("you ")] == said
    assert [entry["slots"] for entry in record[:12]] == list(range(2, 25, 2))
    for entry in record[12:]:
        held = {name: answer["bytes"] for name, answer in entry["compared"].items()}
        assert set(held) == {"memory", "full", "another", "nothing"} and held["nothing"] == 0
        assert held["memory"] == record[11]["memory_bytes"] < held["full"]


def test_the_example_asks_for_what_no_training_told():
    """Names, place, job and pet are those of the generated conversations that are kept for tests."""
    said = " ".join(typed.example())
    for kind, word in (("first_name", "Leila"), ("first_name", "Samir"), ("city", "Bristol"), ("job", "a welder"),
                       ("species", "hamster"), ("pet_name", "Waffles")):  # fmt: skip
        assert word in said and word in entities(kind, "test"), word


def test_mistakes():
    recall = dataclasses.replace(experiment(comp_tokens=2), tokenizer=None)
    with pytest.raises(UserError, match="can chat"):
        Conversation(recall)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--max_tokens", "0"], "max_tokens is 0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "inf"], "temperature inf"),
        (["--top_p", "0"], "top_p 0.0"),
        (["--stop", ""], "no empty text"),
        (["--span", "-1"], "--span is -1"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(monkeypatch, options, says):
    monkeypatch.setattr(chat, "open_experiment", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("sys.argv", ["chat", "smollm2-135m-concat", "--say", "hi", *options])
    with pytest.raises(UserError, match=says):
        chat.main()


def test_any_whole_number_is_a_seed():
    made, sampling = experiment("ccm_concat", comp_tokens=2), Sampling(1.5)
    said = [Conversation(made, 6, sampling=sampling, seed=seed).say("hello") for seed in (-1, 2**32 - 1, 2**70 - 1, 7)]
    assert said[0] == said[1] == said[2] != said[3]
