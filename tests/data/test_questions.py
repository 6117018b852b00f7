"""Evaluation sessions by time step, and the wrong-memory control."""

import numpy as np
import pytest

from jax_ccm.data.config import DialogueConfig, FewShotConfig, OnlineConfig, RecallConfig, TextConfig
from jax_ccm.data.questions import Evaluation, evaluation_examples, wrong_memory, wrong_memory_choices
from jax_ccm.data.sources import Records, open_sources
from jax_ccm.errors import UserError
from jax_ccm.methods import ccm
from jax_ccm.rules import rows
from tests.data.support import VOCAB, dialogues, text_of, tokenizer, write


def texts(example):
    return [text_of(segment.tokens) for segment in example.segments]


def context(example):
    return texts(example)[:-1]


def test_time_steps_of_dialogues():
    records = dialogues(3, 14, 15, 16, 4)
    counts = {}
    for step in (1, 2, 4, 8, 12):
        examples = evaluation_examples(records, DialogueConfig(), tokenizer(), step)
        counts[step] = len(examples)
        assert all(len(example.segments) == step + 1 for example in examples)
    assert counts == {1: 5, 2: 4, 4: 3, 8: 3, 12: 3}
    (example, *_) = evaluation_examples(records, DialogueConfig(), tokenizer(), 12)
    # 14 turns, 12 of them compressed.
    assert texts(example)[-1] == " the turn 12 of 1\nA: the turn 13 of 1</s>"
    exact = evaluation_examples(records, DialogueConfig(truncate=False), tokenizer(), 12)
    assert [example.id for example in exact] == ["records[1]"]


def test_time_steps_of_exchanges():
    """Two turns a step; records as long as the step may begin with one turn alone."""
    records = dialogues(3, 4, 5, 6)
    config = lambda **more: DialogueConfig(unit_of_memory="exchange", **more)
    for truncate, ids in ((True, [[0, 1, 2, 3], [2, 3], []]), (False, [[0, 1], [2, 3], []])):
        for step, wanted in enumerate(ids, 1):
            examples = evaluation_examples(records, config(truncate=truncate), tokenizer(), step)
            assert [e.id for e in examples] == [f"records[{i}]" for i in wanted]
            assert all(len(e.segments) == step + 1 for e in examples)
    odd, even = evaluation_examples(records, config(), tokenizer(), 2)
    assert context(odd) == ["the turn 0 of 2", " the turn 1 of 2\nA: the turn 2 of 2"]
    assert context(even)[0] == "the turn 0 of 3\nA: the turn 1 of 3"
    record = {"contexts": ["a", "b", "c", "d"], "query": "q", "target": "t"}
    pairs = OnlineConfig(unit_of_memory="exchange", separator="\nQ:", answer="\nA:")
    (example,) = evaluation_examples([record], pairs, tokenizer(), 1)
    assert texts(example) == ["a\nA: b", " q\nA: t</s>"]


def test_the_end_token_is_trained_but_not_evaluated():
    """Trap 15."""
    (example,) = evaluation_examples(dialogues(3), DialogueConfig(), tokenizer(), 1)
    tail = example.segments[-1]
    assert text_of(tail.tokens).endswith("</s>") and text_of(tail.tokens[tail.scored]) == " the turn 2 of 0"
    batch = rows.batch(ccm.concat(1), [example], rows.Sizes(100, 1, 40), VOCAB)
    assert text_of(batch.targets[0][batch.weights[0] > 0]) == " the turn 2 of 0"


def test_limits_and_empty_sets():
    with pytest.raises(UserError, match="no evaluation data is left: 0 of 1 dialogues are used; dropped: 1 of more"):
        evaluation_examples(dialogues(4), DialogueConfig(max_tokens_evaluation=10), tokenizer(), 1)
    with pytest.raises(UserError, match="time step 0: evaluation starts at 1"):
        evaluation_examples(dialogues(4), DialogueConfig(), tokenizer(), 0)
    assert evaluation_examples(dialogues(4), DialogueConfig(), tokenizer(), 8) == []


def test_online_steps_and_choices():
    records = [
        {"contexts": [f"c{i}" for i in range(n)], "query": "q", "target": "b", "choices": ["a", "b"]} for n in (1, 3)
    ]
    config = OnlineConfig()
    evaluation = Evaluation(config, tokenizer(), [Records("r", records)])
    assert [context(e) for e in evaluation.examples(1)] == [["c0"], ["c0"]]
    (choice,) = evaluation.choices(3)
    assert choice.answer == 1 and choice.task == ""
    assert [texts(e)[-1] for e in choice.examples] == [" q\nA: a</s>", " q\nA: b</s>"]
    assert all(context(e) == ["c0", " c1", " c2"] for e in choice.examples)
    exact = Evaluation(OnlineConfig(truncate=False), tokenizer(), [Records("r", records)])
    assert [len(exact.choices(step)) for step in (1, 2, 3)] == [1, 0, 1]
    del records[0]["choices"]
    with pytest.raises(UserError, match=r"r\[0\]: the record has no choices"):
        Evaluation(config, tokenizer(), [Records("r", records)]).choices(1)
    with pytest.raises(UserError, match="'dialogue' has no choices"):
        Evaluation(DialogueConfig(), tokenizer(), [Records("r", dialogues(4))]).choices(1)


def fewshot(tmp_path, **fields):
    tasks, demonstrations = [], []
    for name, labels in (("first", ["no", "yes"]), ("second", ["bad", "good", "so"])):
        rows = [{"text": f"{name} {i}", "label": labels[i % len(labels)]} for i in range(8)]
        tasks.append(write(tmp_path / f"{name}_test.jsonl", rows[:4]))
        demonstrations.append(write(tmp_path / f"{name}_train.jsonl", rows[4:]))
    config = FewShotConfig(test=tuple(tasks), demonstrations=tuple(demonstrations), **fields)
    return Evaluation.open(config, tokenizer())


def test_demonstrations_are_a_prefix(tmp_path):
    """Trap 24: the first k of a fixed list, the same for every query of the task."""
    evaluation = fewshot(tmp_path)
    by_step = {step: evaluation.choices(step) for step in (1, 2, 4)}
    for step, choices in by_step.items():
        assert len(choices) == 8
        for number, choice in enumerate(choices):
            shown = context(choice.examples[0])
            assert len(shown) == step and shown == context(by_step[4][number].examples[0])[:step]
    first, last = by_step[1][0], by_step[1][-1]
    assert context(first.examples[0]) == [" first 4 Output: no"]
    assert [texts(e)[-1] for e in last.examples] == [
        f" second 3 Output: {label}</s>" for label in ("bad", "good", "so")
    ]
    assert (first.answer, last.answer) == (0, 0) and first.task.endswith("first_test.jsonl")
    assert evaluation.examples(2)[0].id.endswith("first_test.jsonl:1")


def test_tasks_are_named_by_their_files(tmp_path):
    """Without folder and ending, unless two then have one name."""
    assert list(fewshot(tmp_path).by_task(choices=True)) == ["first_test", "second_test"]
    records = [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(4)]
    same = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        same.append(write(tmp_path / folder / "t.jsonl", records))
    config = FewShotConfig(test=tuple(same), demonstrations=tuple(same))
    assert list(Evaluation.open(config, tokenizer()).by_task(choices=True)) == same


def test_fewshot_needs_demonstrations(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(UserError, match="has 1 tasks but 0 sources of demonstrations"):
        Evaluation.open(FewShotConfig(test=(path,)), tokenizer())


def test_text_and_recall_steps():
    config = TextConfig(chunk=2, max_chunks=3, tokens=20)
    evaluation = Evaluation(config, tokenizer(), [Records("r", [{"text": "abcdefgh"}])])
    assert [texts(e) for s in (1, 3) for e in evaluation.examples(s)] == [["ef", "gh"], ["ab", "cd", "ef", "gh"]]
    config = RecallConfig(test=("generated:recall?split=test&size=3&facts=4",))
    for example in Evaluation.open(config, None).examples(2):
        facts = [tuple(segment.tokens) for segment in example.segments[:-1]]
        tail = example.segments[-1]
        assert len(facts) == 2 and sorted(map(tuple, tail.tokens.reshape(-1, 2))) == sorted(facts)


def test_wrong_memory_is_a_derangement():
    records = [{"turns": [f"a{i % 7}", f"b{i}", f"query {i}", "target"]} for i in range(11)]
    for step in (1, 2):
        right = evaluation_examples(records, DialogueConfig(), tokenizer(), step)
        wrong = wrong_memory(right)
        assert wrong_memory(right)[3].segments[0].tokens.tolist() == wrong[3].segments[0].tokens.tolist()
        for ours, other in zip(right, wrong, strict=True):
            assert ours.id == other.id and len(other.segments) == step + 1
            np.testing.assert_array_equal(ours.segments[-1].tokens, other.segments[-1].tokens)
            assert context(ours) != context(other)
        assert sorted(map(context, right)) == sorted(map(context, wrong))  # a permutation


def test_wrong_memory_of_choices_and_tasks(tmp_path):
    right = fewshot(tmp_path).choices(2)
    wrong = wrong_memory_choices(right)
    for ours, other in zip(right, wrong, strict=True):
        (shown,) = {tuple(context(e)) for e in other.examples}
        assert ours.answer == other.answer and ours.task == other.task
        assert ("first" in shown[0]) != ("first" in context(ours.examples[0])[0])
        assert [texts(e)[-1] for e in ours.examples] == [texts(e)[-1] for e in other.examples]


def test_wrong_memory_that_cannot_be():
    same = evaluation_examples([{"turns": ["a", "b", f"{i}"]} for i in range(3)], DialogueConfig(), tokenizer(), 1)
    with pytest.raises(UserError, match="3 sessions of which 3 share one context"):
        wrong_memory(same)
    with pytest.raises(UserError, match="at least 2 sessions"):
        wrong_memory(same[:1])


def test_questions_by_the_age_of_what_they_ask_for():
    """Each age has the questions that its records name, behind whole contexts, whatever number of chunks that is."""
    config = OnlineConfig(unit_of_memory="exchange", max_turn_tokens=999, max_tokens_evaluation=9999)
    sources = open_sources(["generated:chat_questions?split=test&size=12&turns=14-20&age=1,6"], "online")
    evaluation = Evaluation(config, tokenizer(), sources)
    (source,) = sources
    for place, age in enumerate((1, 6)):
        asked = evaluation.choices_by_age(age)
        assert len(asked) == 6
        for number, choice in enumerate(asked):
            record = source[2 * number + place]
            assert record["age"] == age and choice.answer == record["choices"].index(record["target"])
            assert all(len(example.segments) == 1 + len(record["contexts"]) // 2 for example in choice.examples)
    assert evaluation.choices_by_age(3) == []
    with pytest.raises(UserError, match="needs records of format 'online' that say how long ago"):
        Evaluation(DialogueConfig(), tokenizer(), [Records("d", dialogues(3))]).choices_by_age(1)
    record = {"contexts": ["a", "b"], "query": "c", "target": "d", "choices": ["d", "e"], "age": True}
    with pytest.raises(UserError, match="field 'age' must be a whole number, at least 1; it is True"):
        Evaluation(config, tokenizer(), [Records("r", [record])]).choices_by_age(1)
