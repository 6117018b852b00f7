"""Records become the sessions of the papers."""

import numpy as np
import pytest
from tokenizers import normalizers

from jax_ccm.data import documents
from jax_ccm.data.config import BY_FORMAT, DialogueConfig, TextConfig, kind_of
from jax_ccm.data.formats import Dialogue, despace
from jax_ccm.data.sources import Records, open_sources
from jax_ccm.data.template import Template
from jax_ccm.errors import UserError
from jax_ccm.methods import baselines, ccm
from jax_ccm.rules import rows as layout
from tests.data.support import VOCAB, dialogues, text_of, tokenizer, write

HELLO = {"turns": ["the one", "he is", "in the", "on"]}


def load(records, evaluation=False, **fields):
    format = documents.build(kind_of(fields)(**fields), tokenizer())
    units, report = format.load([Records("r", records)], evaluation)
    return format, units, report


def laid_out(example, method, **sizes):
    sizes = layout.Sizes(**{"tokens": 300, "memory": 40, "scored": 100} | sizes)
    return layout.batch(method, [example], sizes, VOCAB)


def scored_text(example):
    return [text_of(s.tokens[s.scored]) for s in example.segments]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_dialogue_decoded():
    """Trap 14: the separator opens the next segment, after the compression tokens, and the tail too."""
    format, (unit,), _ = load([HELLO], loss="every")
    batch = laid_out(format.draw(unit, rng()), ccm.concat(comp_tokens=2))
    row = batch.tokens[0][: (batch.slots.kind[0] > 0).sum()]
    assert text_of(row) == "<s>the one<C0><C1>\nA: he is<C0><C1>\nA: in the\nA: on</s>"
    none = laid_out(format.draw(unit, rng()), baselines.none())
    assert text_of(none.tokens[0][: (none.slots.kind[0] > 0).sum()]) == "<s> in the\nA: on</s>"


def test_dialogue_losses():
    format, (unit,), _ = load([HELLO], loss="every")
    assert scored_text(format.draw(unit, rng())) == ["", " he is", " in the on</s>"]
    format, (unit,), _ = load([HELLO], loss="last")
    drawn = {len(e.segments): scored_text(e) for e in (format.draw(unit, rng(seed)) for seed in range(20))}
    assert drawn == {2: ["", " in the</s>"], 3: ["", "", " on</s>"]}


def test_number_of_time_steps_is_uniform():
    """Trap 26: k is uniform over 3..len, from the generator that is passed in."""
    format, (unit,), _ = load(dialogues(7))
    generator = rng(1)
    steps = [len(format.draw(unit, generator).segments) - 1 for _ in range(1000)]
    counts = np.bincount(steps)
    assert counts[0] == 0 and len(counts) == 6
    assert np.abs(counts[1:] - 200).max() < 50  # 4 standard deviations
    again = rng(1)
    assert steps[:20] == [len(format.draw(unit, again).segments) - 1 for _ in range(20)]


def test_the_same_sample_twice():
    """Trap 19: drawing changes nothing that is kept, and cannot."""
    for fields, records in (
        ({"loss": "every"}, [HELLO]),
        ({"format": "online", "loss": "every"}, [{"contexts": ["a", "b"], "query": "c", "target": "d"}]),
        ({"format": "fewshot", "shots": 2}, [{"text": f"t{i}", "label": "x"} for i in range(4)]),
        ({"format": "text", "chunk": 2, "max_chunks": 3, "tokens": 20}, [{"text": "abcdefgh"}]),
    ):
        format, units, _ = load(records, **fields)
        method = ccm.concat(comp_tokens=2, sink=True)
        first, second = (laid_out(format.draw(units[0], rng(3)), method) for _ in range(2))
        np.testing.assert_array_equal(first.tokens, second.tokens)
        np.testing.assert_array_equal(first.weights, second.weights)
        with pytest.raises(ValueError, match="read-only"):
            units[0].pieces[0][0] = 1


def test_limits_are_counted():
    records = [*dialogues(2, 3), {"turns": ["x" * 40, "a", "b"]}, {"turns": ["x" * 25] * 4}]
    _, units, report = load(records, max_turn_tokens=30, max_tokens=90)
    assert [unit.id for unit in units] == ["r[1]"]
    assert str(report) == (
        "1 of 4 dialogues are used; dropped: 1 with fewer than 3 turns, "
        "1 with one of their turns longer than 30 tokens, 1 of more than 90 tokens"
    )
    _, units, _ = load(records, evaluation=True, max_turn_tokens=30, max_tokens=90, max_tokens_evaluation=200)
    assert len(units) == 2


def test_long_dialogues_are_cut():
    _, units, report = load(dialogues(11, 4), max_turns=4)
    assert [(unit.id, len(unit.pieces)) for unit in units] == [
        ("r[0] piece 0", 3), ("r[0] piece 1", 4), ("r[0] piece 2", 4), ("r[1]", 4),
    ]  # fmt: skip
    assert text_of(units[1].pieces[0]) == "the turn 3 of 0"  # starts a session: no space in front
    assert str(report) == "4 of 4 dialogues (made of 2 records) are used"


def test_pieces_of_messages_end_with_whoever_ends_the_dialogue():
    """A cut never makes a target of the user's turn, and an exchange stays together."""
    _, units, _ = load(dialogues(14, 13), max_turns=6, unit_of_memory="exchange")
    assert [len(unit.pieces) for unit in units] == [4, 4, 6, 3, 4, 6]
    assert [text_of(unit.pieces[-1])[-9:] for unit in units[:3]] == ["rn 3 of 0", "rn 7 of 0", "n 13 of 0"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Do you want some dessert ?", "Do you want some dessert?"),
        ("I ’ m fine , thanks .It's 3.5 km ... ok", "I'm fine, thanks. It's 3.5 km... ok"),
        ("Yes .  No 。", "Yes. No."),
        ("the ' quoted ' word", "the ' quoted ' word"),
    ],
)
def test_despace(given, wanted):
    assert despace(given) == wanted


def test_cleaning_is_an_option():
    for clean, text in ((True, "Hi, you"), (False, "Hi , you")):
        _, (unit,), _ = load([{"turns": ["Hi , you", "b", "c"]}], clean=clean)
        assert text_of(unit.pieces[0]) == text


def test_online():
    record = {"contexts": ["the one", "he is"], "query": "in the", "target": "on", "choices": ["on", "off"]}
    format, (unit,), report = load([record], format="online", separator="\nQ:", answer="\nA:")
    example = format.draw(unit, rng())
    assert [text_of(s.tokens) for s in example.segments] == ["the one", " he is", " in the\nA: on</s>"]
    assert text_of(example.separator) == "\nQ:" and scored_text(example) == ["", "", " on</s>"]
    assert str(report) == "1 of 1 records are used"
    format, (unit,), _ = load([record | {"contexts": []}], format="online")
    assert [text_of(s.tokens) for s in format.draw(unit, rng()).segments] == ["in the\nA: on</s>"]


TASK = [{"text": f"text {i}", "label": "yes" if i % 2 else "no"} for i in range(6)]


def test_fewshot_format():
    format, units, _ = load(TASK, format="fewshot", shots=2, loss="every")
    example = format.build(units[1], [units[5], units[0]], units[1].pieces[1], 1000, every=True)
    batch = laid_out(example, ccm.concat(comp_tokens=1))
    row = batch.tokens[0][: (batch.slots.kind[0] > 0).sum()]
    assert text_of(row) == (
        "<s>Input: text 5 Output: yes<C0> Input: text 0 Output: no<C0> Input: text 1 Output: yes</s>"
    )
    assert scored_text(example) == ["", " no", " yes</s>"]


def test_fewshot_never_shows_the_query():
    format, units, _ = load(TASK, format="fewshot", shots=5)
    for seed in range(50):
        *shown, query = (text_of(s.tokens).split(" Output")[0] for s in format.draw(units[2], rng(seed)).segments)
        assert query == " text 2" and sorted(shown) == [f" text {i}" for i in (0, 1, 3, 4, 5)]


def test_labels_exchanged_for_words():
    """In about the share asked for, one word for each label, another in each example; texts are what they were."""
    format, units, _ = load(TASK, format="fewshot", shots=5, symbols=0.5)
    renamed, said = 0, set()
    for seed in range(200):
        pieces = [text_of(s.tokens).removesuffix("</s>") for s in format.draw(units[2], rng(seed)).segments]
        pairs = [piece.removeprefix("Input:").strip().split(" Output: ") for piece in pieces]
        exchanged = {TASK[int(text.split()[-1])]["label"]: label for text, label in pairs}
        assert sorted(text for text, _ in pairs) == sorted(record["text"] for record in TASK)
        for text, label in pairs:
            assert label == exchanged[TASK[int(text.split()[-1])]["label"]], "one word for each label"
        assert exchanged["yes"] != exchanged["no"]
        if set(exchanged.values()) != {"yes", "no"}:
            renamed += 1
            said |= set(exchanged.values())
    assert 70 < renamed < 130  # 4 standard deviations
    assert len(said) > renamed, "other words each time"
    plain, units, _ = load(TASK, format="fewshot", shots=5)
    assert all("yes" in text_of(plain.draw(units[1], rng(seed)).segments[-1].tokens) for seed in range(20))


def test_fewshot_budget_stops_at_the_first_overflow():
    """Trap 20: no demonstration is skipped to fit a later one, and compression tokens do not count."""
    lengths = [10, 10, 60, 10, 10]
    records = [{"text": "x" * length, "label": "y"} for length in lengths]
    format, units, _ = load(records, format="fewshot", shots=4, max_tokens=140)
    # Bytes are tokens: text and label have a space in front, "<s>Input:" 7, " Input:" 7, " Output:" 8, "</s>" 1.
    whole = lambda text: 7 + (1 + text) + 8 + 2
    assert whole(10) * 3 + 1 <= 140 < whole(10) * 3 + whole(60) + 1
    for most, shown in (
        (140, 2),
        (whole(10) * 3 + 1, 2),
        (whole(10) * 3, 1),
        (whole(10), 0),
        (163, 3),
        (162, 2),
        (191, 4),
    ):
        order = [units[1], units[3], units[2], units[4]]
        example = format.build(units[0], order, units[0].pieces[1], most, every=False)
        assert len(example.segments) - 1 == shown, most
        assert (
            layout.measure(ccm.concat(4), example).tokens
            == sum(len(s.tokens) + 7 for s in example.segments) + 4 * shown
        )


def test_fewshot_errors():
    with pytest.raises(UserError, match="'r' has 6 usable examples; 6 demonstrations and a query need 7"):
        load(TASK, format="fewshot", shots=6)
    _, units, report = load([*TASK, {"text": "x" * 300, "label": "no"}], format="fewshot", shots=3)
    assert len(units) == 6 and "1 of more than 256 tokens" in str(report)


def test_text_windows():
    format, units, report = load(
        [{"text": "abcdefghijklm"}, {"text": "xy"}], format="text", chunk=3, max_chunks=2, tokens=20, loss="every"
    )
    assert [[text_of(p) for p in unit.pieces] for unit in units] == [["abc", "def", "ghi"], ["jkl", "m"]]
    assert str(report) == "2 of 3 windows (made of 2 records) are used; dropped: 1 with fewer than 2 chunks"
    example = format.draw(units[0], rng())
    assert scored_text(example) == ["", "def", "ghi"] and text_of(example.start) == "<s>"
    batch = laid_out(example, ccm.concat(1))
    assert text_of(batch.tokens[0][: (batch.slots.kind[0] > 0).sum()]) == "<s>abc<C0>def<C0>ghi"
    format, units, _ = load([{"text": "abcdef"}], format="text", chunk=3, max_chunks=2, tokens=20)
    assert scored_text(format.draw(units[0], rng())) == ["", "def"]


@pytest.mark.parametrize("loss", ["last", "every"])
@pytest.mark.parametrize(
    "method", [ccm.concat(2), ccm.merge(3, sink=True), ccm.gist(2), baselines.full(), baselines.none()]
)
def test_no_draw_needs_more_than_announced(method, loss):
    cases = [
        ({}, dialogues(3, 9, 5)),
        ({"unit_of_memory": "exchange"}, dialogues(3, 9, 6)),
        ({"format": "online"}, [{"contexts": ["a"] * n, "query": "b" * 9, "target": "c"} for n in range(5)]),
        ({"format": "fewshot", "shots": 3, "max_tokens": 60}, TASK),
        ({"format": "fewshot", "shots": 3, "max_tokens": 90, "symbols": 0.5}, TASK),
        ({"format": "text", "chunk": 3, "max_chunks": 2, "tokens": 20}, [{"text": "abcdefghijklm"}]),
    ]
    for fields, records in cases:
        format, units, _ = load(records, loss=loss, **fields)
        for unit in units:
            most = format.needs(unit, method)
            found = [layout.measure(method, format.draw(unit, rng(seed))) for seed in range(30)]
            for field in ("tokens", "memory", "scored"):
                largest = max(getattr(sizes, field) for sizes in found)
                assert largest <= getattr(most, field)
                if not fields.get("shots"):  # few-shot limits hold for any demonstrations
                    assert largest == getattr(most, field)


def test_what_is_closed_as_one_chunk():
    """By exchange two turns are one chunk, counted back from the tail, which holds the last exchange in any case."""
    texts = {
        ("turn", 4): ["<s>the one", "\nA: he is", "\nA: in the\nA: on</s>"],
        ("exchange", 4): ["<s>the one\nA: he is", "\nA: in the\nA: on</s>"],
        ("exchange", 3): ["<s>the one", "\nA: he is\nA: in the</s>"],
    }
    for (unit, count), wanted in texts.items():
        for loss in ("last", "every"):
            format, (own,), _ = load([{"turns": HELLO["turns"][:count]}], unit_of_memory=unit, loss=loss, min_turns=3)
            example = next(
                e for e in (format.draw(own, rng(seed)) for seed in range(50)) if len(e.segments) == len(wanted)
            )
            rows = layout.arrange(ccm.concat(1), example)
            assert [text_of(segment.tokens) for segment in rows] == wanted
    # What is scored does not depend on it, nor what other methods are fed.
    scored = {}
    for unit in ("turn", "exchange"):
        format, (own,), _ = load(dialogues(7), unit_of_memory=unit, loss="every")
        example = format.draw(own, rng())
        scored[unit] = "".join(scored_text(example))
        assert len(example.segments) == {"turn": 6, "exchange": 4}[unit]
        assert len(layout.arrange(ccm.gist(), example)) == 2
    assert scored["turn"] == scored["exchange"]
    with pytest.raises(UserError, match="format 'fewshot' does not read it"):
        kind_of({"format": "fewshot", "unit_of_memory": "turn"})
    with pytest.raises(UserError, match="unknown data.unit_of_memory 'pair'"):
        DialogueConfig(unit_of_memory="pair")


BLANKS = {
    "dialogue": ({}, {"turns": ["a", "b", "c"]}, {"turns": ["a", "\u3000\n", "c"]}, "one of their turns empty"),
    "online": (
        {}, {"contexts": ["a"], "query": "b", "target": "c"}, {"contexts": ["a"], "query": "b", "target": " "},
        "one of their pieces empty",
    ),
    "fewshot": ({"shots": 1}, {"text": "a", "label": "b"}, {"text": "a", "label": ""}, "without text or label"),
    "text": ({"chunk": 2, "max_chunks": 2}, {"text": "abcdef"}, {"text": "\t\n "}, "without text"),
}  # fmt: skip


@pytest.mark.parametrize("format", BLANKS)
def test_a_record_with_nothing_in_it_is_dropped_and_counted(tmp_path, format):
    """One among thousands: the whole record goes, and the report names the first."""
    fields, good, bad, reason = BLANKS[format]
    source = write(tmp_path / "a.jsonl", [good, bad, good, good, bad])
    config = BY_FORMAT[format](**fields)
    units, report = documents.build(config, tokenizer()).load(open_sources([source], format))
    assert len(units) == 3 and report.records == 5
    assert f"3 of 5 {report.noun} are used; dropped: 2 " in str(report)
    assert f"{reason} (the first: {source}:2)" in str(report)


def test_text_that_the_tokenizer_leaves_out_is_no_turn():
    made = tokenizer.__wrapped__()
    made.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    for config, record in (
        (DialogueConfig(), {"turns": ["\u200b", "a", "c"]}), (TextConfig(), {"text": "\u200b"}),
    ):  # fmt: skip
        units, report = documents.build(config, made).load([Records("r", [record])])
        assert not units and report.dropped.total() == 1 and "r[0]" in str(report)


def test_turns_that_a_record_names_for_the_loss(tmp_path):
    """They are scored, and the last; in a piece of a long dialogue those that lie in it."""
    turns = [f"the turn {number}" for number in range(8)]
    path = write(tmp_path / "a.jsonl", [{"turns": turns, "scored": [1, 2, 5]}])
    config = DialogueConfig(train=(path,), loss="every", max_turns=4)
    made = Dialogue(config, Template(tokenizer()))
    units, _ = made.load(open_sources([path], "dialogue"))
    scored = lambda unit: [text_of(s.tokens[s.scored]) for s in made.draw(unit, np.random.default_rng(0)).segments]
    assert [scored(unit) for unit in units] == [
        ["", " the turn 1", " the turn 2 the turn 3</s>"],
        ["", " the turn 5", " the turn 7</s>"],
    ]
    for wrong in (["1"], [0], [8], 3, [True], [1.0]):
        path = write(tmp_path / "b.jsonl", [{"turns": turns, "scored": wrong}])
        with pytest.raises(UserError, match="field 'scored' lists numbers of turns, from 1 to 7"):
            made.load(open_sources([path], "dialogue"))
