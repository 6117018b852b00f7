"""Prompts: where they are cut, whose context is whose, and the likelihoods of texts of any length."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.data.config import DialogueConfig, RecallConfig, TextConfig
from jax_ccm.errors import UserError
from jax_ccm.evals import prompts
from jax_ccm.evals.perplexity import System
from jax_ccm.evals.prompts import Cutting, Prompt, Settings, rolling, windows, with_contexts_of_others
from jax_ccm.evals.scoring import score
from jax_ccm.methods import build
from jax_ccm.rules.examples import Example, Segment, cut
from tests import cases
from tests.evals.support import SMALL

pytestmark = pytest.mark.once

NOTHING = np.zeros(0, np.int32)
HEAD = "<user>"


def prompt(text: str, special: int = 0, size: int = 1) -> Prompt:
    """A text whose tokens are of ``size`` characters; the first ones may have been put in by the tokenizer."""
    begins = np.array([0] * special + list(range(0, len(text), size)))
    tokens = np.array([1] * special + [5 + ord(text[i]) % 80 for i in begins[special:]], np.int32)
    return Prompt(text, tokens, begins, special)


def pieces(cutting: Cutting, given: Prompt) -> list[str]:
    """The pieces of a prompt as text, the start in brackets in front if there is one."""
    ends = [cutting.start(given), *cutting.ends(given), len(given.tokens)]
    at = [*given.begins.tolist(), len(given.text)]
    found = [given.text[at[a] : at[b]] for a, b in zip(ends, ends[1:], strict=False)]
    return ["[" + given.text[: at[ends[0]]] + "]"] * bool(ends[0]) + found


@pytest.mark.parametrize(
    ("how", "text", "found"),
    [
        # Behind blank lines; the last piece is what asks, whatever follows it.
        ({}, "ab\n\ncd\n\nef", ["ab\n\n", "cd\n\n", "ef"]),
        ({}, "ab\n\ncd\n\n", ["ab\n\n", "cd\n\n"]),
        ({}, "abc", ["abc"]),
        # What is longer than a chunk is cut, the last piece, too, of which at least a token stays.
        ({"chunk": 4}, "abcdef\n\nghijklmno", ["abcd", "ef\n\n", "ghij", "klmn", "o"]),
        ({"chunk": 4}, "abcdefgh", ["abcd", "efgh"]),
        ({"chunk": 4, "tail": 3}, "abcdefghi", ["abcd", "efghi"]),
        ({"tail": 5}, "ab\n\ncd\n\nef", ["ab\n\n", "cd\n\nef"]),
        # Other delimiters, and none.
        ({"delimiter": "#"}, "a#b\n\nc#d", ["a#", "b\n\nc#", "d"]),
        ({"delimiter": "", "chunk": 3}, "ab\n\ncd", ["ab\n", "\ncd"]),
        # Turns of the user's, where there are several; a system message stands in front of all.
        ({"head": HEAD}, f"{HEAD}a\n\nb{HEAD}c", [f"{HEAD}a\n\nb", f"{HEAD}c"]),
        ({"head": HEAD}, f"sys{HEAD}a{HEAD}c", ["[sys]", f"{HEAD}a", f"{HEAD}c"]),
        ({"head": HEAD}, f"sys{HEAD}a\n\nc", ["[sys]", f"{HEAD}a\n\n", "c"]),
        ({"head": HEAD, "delimiter": "c"}, f"{HEAD}acb{HEAD}c d", [f"{HEAD}ac", f"b{HEAD}c", " d"]),
        ({"head": HEAD}, "ab\n\nc", ["ab\n\n", "c"]),
    ],
)
def test_where_prompts_are_cut(how, text, found):
    cutting = Cutting(**{"chunk": 50, **how})
    assert pieces(cutting, prompt(text)) == found
    session = cutting.session(build("full"), given := prompt(text, special=1), np.array([7, 8], np.int32))
    # All of it is there once, and the continuation alone is scored.
    everything = np.concatenate([session.start, *(segment.tokens for segment in session.segments)])
    assert everything.tolist() == [*given.tokens.tolist(), 7, 8]
    scored = np.concatenate([segment.scored for segment in session.segments])
    assert scored.tolist() == [False] * (len(scored) - 2) + [True] * 2
    assert session.start[0] == 1 and all(len(segment.tokens) for segment in session.segments)


def test_a_token_across_a_border_belongs_to_what_is_before():
    """Tokens of three characters: ``ab\\n`` and ``\\ncd`` make the first piece."""
    assert pieces(Cutting(50), prompt("ab\n\ncdefg\n\nhi", size=3)) == ["ab\n\ncd", "efg\n\nh", "i"]


def test_a_system_message_stays_text_where_it_can():
    cutting, given = Cutting(50, head=HEAD), prompt(f"sys{HEAD}a{HEAD}c", special=1)
    kept = {
        name: cutting.session(build(name, **options), given).keeps_start
        for name, options in {"ccm_concat": {"sink": True}, "ccm_merge": {}, "full": {}}.items()
    }
    assert kept["ccm_concat"] and not kept["ccm_merge"]
    # A beginning-of-sequence token alone is none.
    assert not cutting.session(build("ccm_concat", sink=True), prompt("ab\n\nc", special=1)).keeps_start


def test_the_length_of_a_chunk_is_that_of_the_data():
    chunk = lambda data, method, **how: Settings(**how).cutting(data, build(method)).chunk
    assert chunk(DialogueConfig(max_turn_tokens=77), "ccm_concat") == 77
    assert chunk(TextConfig(chunk=9), "full") == 9 and chunk(TextConfig(chunk=9), "full", chunk=5) == 5
    assert Settings(delimiter=r"\n#").cutting(TextConfig(), build("full")).delimiter == "\n#"
    with pytest.raises(UserError, match="do not say how long a chunk is; give chunk"):
        chunk(RecallConfig(), "full")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"chunk": -1}, "chunk is -1; give a whole number from 0 on"),
        ({"tail": 0}, "tail is 0; give a whole number from 1 on"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"max_gen_toks": True}, "max_gen_toks is True"),
    ],
)
def test_settings_that_cannot_be(how, message):
    with pytest.raises(UserError, match=message):
        Settings(**how)


def test_wrong_memory_is_that_of_the_next_other_context():
    cutting = Cutting(50)
    session = lambda text, answer: cutting.session(build("full"), prompt(text), np.array([answer], np.int32))
    mine = [session("aa\n\nx", 1), session("aa\n\nx", 2), session("bb\n\ny", 1), session("z", 1), session("cc\n\nw", 1)]
    made = with_contexts_of_others(mine)
    front = lambda example: [segment.tokens.tolist() for segment in example.segments[:-1]]
    assert [front(x) for x in made] == [front(mine[i]) for i in (2, 2, 4, 3, 0)]
    assert [x.segments[-1] for x in made] == [x.segments[-1] for x in mine]
    with pytest.raises(UserError, match="of these 2 requests 1 different contexts become memory"):
        with_contexts_of_others(mine[:2])


def test_windows_by_hand():
    """Each token is scored once; the last window reaches back as far as the others."""
    tokens = np.arange(10, 17, dtype=np.int32)
    found = [(before.tolist(), scored.tolist()) for before, scored in windows(tokens, 1, 3)]
    assert found == [([1], [10, 11, 12]), ([12], [13, 14, 15]), ([13, 14, 15], [16])]
    assert list(windows(tokens[:0], 1, 3)) == []


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge", "evict", "full"])
def test_texts_stream_through_a_memory(name, monkeypatch):
    """The same likelihoods as by the parallel forward over the whole text, where there is one; each text by itself."""
    options = {"ccm_concat": {"comp_tokens": 2}, "ccm_merge": {"comp_tokens": 1, "sink": True}}.get(name, {})
    method = build(name, **options)
    system = System("memory", cases.model(config=SMALL, tokens=2), method, "")
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, cases.VOCAB, size).astype(np.int32) for size in (23, 0, 5, 8)]
    closed = []
    step = prompts.score_recurrently
    monkeypatch.setattr(prompts, "score_recurrently", lambda m, k, x, **kw: closed.append(x) or step(m, k, x, **kw))
    found = rolling(system, texts, 1, chunk=5, rows=2)
    assert [[len(s.tokens) for s in x.segments] for x in closed[0]] == [[5, 5, 5, 5, 3], [5], [5, 3]]
    alone = [rolling(system, [text], 1, chunk=5, rows=1)[0] for text in texts[2:]]
    assert found[1] == 0.0 and found[2:] == pytest.approx(alone, rel=1e-5)
    if not method.recurrent_only:
        whole = lambda text: cut(Segment(text, np.ones(len(text), bool)), 5)
        examples = [Example(np.array([1], np.int32), NOTHING, whole(text)) for text in texts if len(text)]
        expected = [-x.nll.sum() for x in score(system.model, method, examples, rows=2)]
        assert [found[0], *found[2:]] == pytest.approx(expected, rel=1e-5)
    # Something was kept: with nothing before it, the end of the text is as likely as any.
    assert found[0] != pytest.approx(sum(rolling(system, [x], 1, chunk=5, rows=1)[0] for x in np.split(texts[0], [20])))


def test_what_compresses_everything_anew_streams_nothing():
    system = System("memory", cases.model(config=SMALL, tokens=1), build("gist"), "")
    with pytest.raises(UserError, match="'gist' compresses all text anew each time.*method.online: true"):
        rolling(system, [np.arange(5)], 1, chunk=2, rows=1)
