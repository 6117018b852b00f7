"""Small files in the formats of benchmarks become questions behind contexts."""

from __future__ import annotations

import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from jax_ccm.data.config import FewShotConfig, OnlineConfig
from jax_ccm.data.questions import Evaluation
from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError
from tests.data.support import text_of, tokenizer, write


def records(source: str) -> list[dict]:
    (opened,) = open_sources([source], "online")
    return [opened[index] for index in range(len(opened))]


def as_parquet(path, rows: list[dict]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


BABILONG = [
    {"input": "It was dark. Mary went to the garden. Call me Ishmael, he said.", "question": "Where is Mary?",
     "target": "garden"},
    {"input": "John is in the hall.", "question": "Where is John?", "target": "hall"},
]  # fmt: skip


def test_babilong(tmp_path):
    path = as_parquet(tmp_path / "qa1.parquet", BABILONG)
    first, second = records(f"babilong:{path}?words=8")
    assert first == {
        "contexts": ["It was dark. Mary went to the garden.", "Call me Ishmael, he said."],
        "query": "Where is Mary?", "target": "garden", "choices": ["garden", "hall"],
    }  # fmt: skip
    assert second["contexts"] == ["John is in the hall."]
    (tmp_path / "qa1.json").write_text(json.dumps(BABILONG))
    assert "choices" not in records(f"babilong:{tmp_path / 'qa1.json'}?choices=1")[0]
    assert max(len(text.split()) for text in records(f"babilong:{path}?words=3")[0]["contexts"]) == 3
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"bad.parquet cannot be read as Parquet"):
        records(f"babilong:{tmp_path / 'bad.parquet'}")
    with pytest.raises(UserError, match="words=0 of a source must be at least 1"):
        records(f"babilong:{path}?words=0")


def memory(id: str = "q1", kind: str = "knowledge-update") -> dict:
    said = lambda *texts: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {
        "question_id": id, "question_type": kind, "question": "Where do I live?", "answer": 7,
        "question_date": "2023/06/01 (Thu) 10:00", "haystack_session_ids": ["b", "a"], "answer_session_ids": ["b"],
        "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/01 (Mon) 02:21"],
        "haystack_sessions": [said("I moved to seven.", "Good."), said("Hi one two three", "Hello!", "Bye")],
    }  # fmt: skip


def test_longmemeval(tmp_path):
    path = tmp_path / "longmemeval_s.json"
    path.write_text(json.dumps([memory(), memory("q2_abs"), memory("q3", "multi-session")]))
    (source,) = open_sources([f"longmemeval:{path}?words=3"], "online")
    assert source[0] == {
        "contexts": [
            "[2023/05/01 (Mon) 02:21] Hi one two", "Hello!", "[2023/05/20 (Sat) 02:21] I moved to", "Good.",
        ],
        "query": "[2023/06/01 (Thu) 10:00] Where do I live?", "target": "7", "task": "knowledge-update",
    }  # fmt: skip
    assert source.where(1) == f"{path}[2] (multi-session)" and len(source) == 2
    assert source.changed["messages cut after 3 words"] == 4
    assert len(records(f"longmemeval:{path}?type=abstention")) == 1
    with pytest.raises(UserError, match="did you mean 'multi-session'"):
        records(f"longmemeval:{path}?type=multi-sesion")
    path.write_text(json.dumps([memory() | {"haystack_dates": []}]))
    with pytest.raises(UserError, match=r"s\.json\[0\]: there are 2 haystack_sessions, but 0 haystack_dates"):
        records(f"longmemeval:{path}")


def test_locomo(tmp_path):
    turns = [{"speaker": "Ann", "dia_id": "D1:1", "text": "Hi!"},
             {"speaker": "Bob", "dia_id": "D1:2", "text": "Look.", "blip_caption": "a dog"}]  # fmt: skip
    talk = {"speaker_a": "Ann", "session_10": turns[:1], "session_10_date_time": "later", "session_2": turns,
            "session_2_date_time": "1 May"}  # fmt: skip
    asked = [{"question": "Who?", "answer": 2022, "category": 2, "evidence": ["D1:1"]},
             {"question": "What?", "adversarial_answer": "a cat", "category": 5}]  # fmt: skip
    path = tmp_path / "locomo10.json"
    path.write_text(json.dumps([{"sample_id": "x", "conversation": talk, "qa": asked}]))
    assert records(f"locomo:{path}") == [
        {"contexts": ["[1 May] Ann: Hi!", "Bob: Look. [shares a picture: a dog]", "[later] Ann: Hi!"],
         "query": "Who?", "target": "2022", "task": "category 2"}
    ]  # fmt: skip
    (never,) = records(f"locomo:{path}?category=5")
    assert never["choices"] == ["Not mentioned in the conversation", "a cat"]
    with pytest.raises(UserError, match="ask them by themselves"):
        records(f"locomo:{path}?category=4,5")
    path.write_text(json.dumps([{"conversation": talk, "qa": [{"question": "Who?", "category": 1}]}]))
    with pytest.raises(UserError, match=r"locomo10\.json\[0\]: qa\[0\]: there is no field 'answer'"):
        records(f"locomo:{path}")


def test_kvpress(tmp_path):
    row = {"context": "The number is 7. The other is 8.", "question": "Which?", "answer_prefix": " They are",
           "answer": ["7", "8"], "max_new_tokens": 16, "task": "niah"}  # fmt: skip
    path = as_parquet(tmp_path / "ruler.parquet", [row, row | {"task": "qa", "answer_prefix": ""}])
    assert records(f"kvpress:{path}?words=5&task=niah") == [
        {
            "contexts": ["The number is 7.", "The other is 8."],
            "query": "Which?\nThey are",
            "target": "7, 8",
            "task": "niah",
        }
    ]
    assert records(f"kvpress:{path}")[1]["query"] == "Which?"
    path = write(tmp_path / "loogle.jsonl", [row | {"answer": 5}])
    with pytest.raises(UserError, match=r"loogle\.jsonl:1: field 'answer' must be a list, it is 5"):
        records(f"kvpress:{path}")


def test_movielens(tmp_path):
    """The three layouts of its releases say the same; users stand in one split each."""
    rated = [(user, movie, 1 + (user + movie) % 5, 100 - movie) for user in range(30) for movie in (1, 2, 3)]
    for name, between, title, between_titles, heads in (
        ("ratings.csv", ",", "movies.csv", ",", True), ("ratings.dat", "::", "movies.dat", "::", False),
        ("u.data", "\t", "u.item", "|", False),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        lines = ["userId,movieId,rating,timestamp"] * heads + [between.join(map(str, row)) for row in rated]
        (folder / name).write_text("\n".join(lines))
        lines = ["movieId,title,genres"] * heads + [between_titles.join((str(m), f"M{m}", "A|B")) for m in (1, 2, 3)]
        (folder / title).write_text("\n".join(lines), encoding="latin-1")
        splits = [records(f"movielens:{folder}?history=2&split={split}") for split in ("train", "validation", "test")]
        assert sum(map(len, splits)) == 30 and all(splits)
        genres = "" if name == "u.data" else " (A, B)"
        record = splits[0][0]
        # The latest first in the file is the last in time.
        assert record["contexts"][0].startswith(f"M3{genres}: ") and record["query"] == f"M1{genres}:"
        assert record["choices"] == ["1", "2", "3", "4", "5"] and record["target"] in record["choices"]
    with pytest.raises(UserError, match="nothing of it can be used .* of users with 5 ratings or fewer"):
        records(f"movielens:{folder}?history=5")
    with pytest.raises(UserError, match="holds no MovieLens"):
        records(f"movielens:{tmp_path}")
    (folder / "u.data").write_text("1\t2\tgood\t3")
    with pytest.raises(UserError, match=r"u\.data:1: rating and time must be numbers"):
        records(f"movielens:{folder}")


def test_gsm8k(tmp_path):
    problems = [{"question": f"How many {n}?", "answer": f"It is <<1+{n}=2>>{n}.\n#### 1,0{n}"} for n in range(5)]
    path = write(tmp_path / "test.jsonl", problems)
    made = records(f"gsm8k:{path}?shots=2")
    assert made[3]["target"] == "It is 3.\n#### 1,03" and made[3]["answers"] == ["103"]
    for number, record in enumerate(made):
        assert len(record["contexts"]) == 4 and f"How many {number}?" not in record["contexts"]
        assert record["contexts"][1] == f"It is {record['contexts'][0][9]}.\n#### 1,0{record['contexts'][0][9]}"
    assert made == records(f"gsm8k:{path}?shots=2") != records(f"gsm8k:{path}?shots=2&seed=1")
    with pytest.raises(UserError, match="has 5 problems, too few for 5"):
        records(f"gsm8k:{path}?shots=5")


def lamp(tmp_path, task: str, rows: list[dict]) -> str:
    """The two files of a split."""
    asked = [{"id": f"{n}0", "input": row["input"], "profile": row["profile"]} for n, row in enumerate(rows)]
    golds = [{"id": f"{n}0", "output": row["output"]} for n, row in enumerate(rows)]
    (tmp_path / "dev_questions.json").write_text(json.dumps(asked))
    (tmp_path / "dev_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return f"lamp:{tmp_path / 'dev_questions.json'}"


def test_lamp(tmp_path):
    """What belongs to one profile is a context each; a smaller profile is a part of a larger one."""
    entries = [{"id": str(n), "text": f"film number {n}", "score": str(n)} for n in range(5)]
    rows = [{"input": "What is the score?", "profile": entries, "output": score} for score in ("4", "2")]
    source = lamp(tmp_path, "LaMP_3", [*rows, {"input": "And now?", "profile": [], "output": "1"}])
    first, second = records(f"{source}?profile=3&words=2")
    assert first["query"] == "What is the score?" and (first["target"], second["target"]) == ("4", "2")
    assert first["choices"] == ["2", "4"] and first["task"] == "LaMP_3"
    assert all(re.fullmatch(r'\d is the score for "film number"', context) for context in first["contexts"])
    assert first["contexts"] != second["contexts"]
    assert records(f"{source}?profile=2&words=2")[0]["contexts"] == first["contexts"][:2]
    assert records(f"{source}?profile=3&words=2&seed=1")[0]["contexts"] != first["contexts"]
    (opened,) = open_sources([source], "online")
    assert len(opened) == 2 and [reason for reason, _ in opened.dropped] == ["without a profile"]
    for task, entry, said in (
        ("LaMP_1", {"title": "T", "abstract": "A"}, '"T" is the title for "A"'),
        ("LaMP_2", {"description": "D", "tag": "sci-fi"}, 'the tag for the movie: "D" is "sci-fi"'),
        ("LaMP_2N", {"text": "X", "title": "T", "category": "art"}, 'the category for the article: "X" is "art"'),
        ("LaMP_4", {"text": "X", "title": "T"}, '"T" is the title for "X"'),
        ("LaMP_7", {"text": "X"}, '"X"'),
    ):
        source = lamp(tmp_path, task, [{"input": "?", "profile": [entry], "output": out} for out in ("a", "b")])
        first, _ = records(source)
        assert first["contexts"] == [said] and ("choices" in first) == (task in ("LaMP_1", "LaMP_2", "LaMP_2N"))
    with pytest.raises(UserError, match=r"profile\[0\]: an entry of a profile has a text, .* \(this one: id\)"):
        records(lamp(tmp_path, "LaMP_7", [{"input": "?", "profile": [{"id": 1}], "output": "a"}]))
    (tmp_path / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": [{"id": "1", "output": "a"}]}))
    with pytest.raises(UserError, match="the outputs have no answer to '00'; both files must be of one split"):
        records(source)
    with pytest.raises(UserError, match="LaMP's questions are in a file like dev_questions.json"):
        records(f"lamp:{tmp_path / 'dev_outputs.json'}")


METAICL = [
    {"task": "t", "input": "a film ", "output": "good", "options": ["bad", "good", "good "]},
    {"task": "t", "input": "a book", "output": "fine", "options": ["fine", "dull", "odd"]},
    {"task": "t", "input": "free", "output": "anything", "options": []},
]


def test_metaicl(tmp_path):
    """The options of a row are its answers; without any the labels of the task are."""
    path = write(tmp_path / "t_16_100_test.jsonl", METAICL)
    (task,) = open_sources([f"metaicl:{path}"], "fewshot")
    assert task[0] == {"text": "a film", "label": "good", "choices": ["bad", "good"]} and "choices" not in task[2]
    source = f"metaicl:{path}"
    evaluation = Evaluation.open(FewShotConfig(test=(source,), demonstrations=(source,)), tokenizer())
    found = evaluation.choices(2)
    answer = lambda example: text_of(example.segments[-1].tokens).split(" Output:")[1].removesuffix("</s>")
    said = [[answer(example) for example in choice.examples] for choice in found]
    assert said[0] == [" bad", " good"] and said[1] == [" fine", " dull", " odd"] and len(said[2]) == 3
    assert [choice.answer for choice in found[:2]] == [1, 0]
    write(tmp_path / "t_16_100_test.jsonl", [METAICL[0] | {"output": "great"}])
    with pytest.raises(UserError, match="t_16_100_test.jsonl:1: the label 'great' is not among the choices"):
        open_sources([source], "fewshot")


def test_they_can_be_asked(tmp_path):
    path = as_parquet(tmp_path / "qa1.parquet", BABILONG)
    config = OnlineConfig(test=(f"babilong:{path}?words=8",))
    evaluation = Evaluation.open(config, tokenizer())
    assert [len(choice.examples) for choice in evaluation.choices(1)] == [2, 2]


def squad(**changes) -> dict:
    """Two articles, of three paragraphs and of one."""

    def asked(id, text, *answers, **more):
        found = [{"text": answer, "answer_start": 0} for answer in answers]
        return {"id": id, "question": text, "answers": found} | more

    def paragraph(text, *questions):
        return {"context": text, "qas": list(questions)}

    sailed = asked("a", "When did the Ark sail?", "May", "in May", "May")
    where = asked("d", "Where is Faro?", "by the sea", is_impossible=False)
    ships = [
        paragraph("The Ark sailed in May. It was slow.", sailed),
        paragraph("The Bee is small.", asked("b", "Who built the Bee?", is_impossible=True)),
        paragraph("The Cod sank\nnear Faro."),
    ]
    towns = [paragraph("Faro lies by the sea.", where)]
    data = [{"title": "Ships", "paragraphs": ships}, {"title": "Towns", "paragraphs": towns}]
    return {"version": "v2.0", "data": data} | changes


def test_squad(tmp_path):
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(squad()))
    first, last = records(f"squad:{path}?words=14")
    assert (
        first["query"] == "When did the Ark sail?"
        and first["target"] == "May"
        and first["answers"] == ["May", "in May"]
    )
    # Those of its own article come first, numbered as they stand, and whole.
    said = " ".join(first["contexts"])
    assert [int(n) for n in re.findall(r"Document (\d+):", said)] == [1, 2, 3]
    assert "Faro lies" not in said and "The Cod sank near Faro." in said
    # Of the one that has nothing near, others of the file.
    assert len(re.findall("Document", " ".join(last["contexts"]))) >= 3 and last["task"] == "squad"
    # Short contexts: the paragraph begins so many contexts before the question.
    for record in records(f"squad:{path}?words=40&chunk=5"):
        begins = " ".join(record["contexts"][-record["age"] :])
        assert max(len(text.split()) for text in record["contexts"]) <= 5
        assert record["answers"][-1].split()[-1] in begins.replace(".", " ").split()
    # All paragraphs, when more are asked for than there are; nothing changes from one opening to the next.
    every = records(f"squad:{path}?words=9000")
    assert all(len(re.findall("Document", " ".join(record["contexts"]))) == 4 for record in every)
    assert every == records(f"squad:{path}?words=9000") != records(f"squad:{path}?words=9000&seed=1")
    assert records(f"squad:{path}?words=1")[1]["contexts"] == ["Document 1: Faro lies by the sea."]
    path.write_text(json.dumps(squad(data=[{"title": "x", "paragraphs": [{"context": 3, "qas": []}]}])))
    with pytest.raises(UserError, match=r"data\[0\]: paragraphs\[0\]: field 'context' must be a string"):
        records(f"squad:{path}")


def hotpot(**changes) -> dict:
    ark = ["Ark", ["The Ark is a ship.", " It sailed to Faro."]]
    row = {"_id": "h", "question": "To which country did the Ark sail?", "answer": "Portugal"}
    row |= {"context": [ark, ["Bee", ["The Bee is small."]], ["Faro", ["Faro is in Portugal."]]]}
    return row | {"supporting_facts": [["Ark", 1], ["Faro", 0]]} | changes


def test_hotpotqa(tmp_path):
    path = tmp_path / "hotpot.json"
    other = hotpot(_id="i", supporting_facts=[["Dog", 0]])
    path.write_text(json.dumps([hotpot(), other, hotpot(_id="j", answer="")]))
    (record,) = records(f"hotpotqa:{path}?words=12")
    said = " ".join(record["contexts"])
    assert "Ark The Ark is a ship. It sailed to Faro." in said and "Faro Faro is in Portugal." in said
    assert "Bee" not in said and record["target"] == "Portugal" and record["task"] == "hotpotqa"
    assert "Bee" in " ".join(records(f"hotpotqa:{path}?words=16")[0]["contexts"])
    for changes, message in (
        (dict(context=["Ark"]), r"context\[0\] must be a list of two, it is 'Ark'"),
        (dict(context=[["Ark", "text"]]), "must be a title and a list of sentences"),
        (dict(supporting_facts=3), "field 'supporting_facts' must be a list, it is 3"),
    ):
        path.write_text(json.dumps([hotpot(**changes)]))
        with pytest.raises(UserError, match=message):
            records(f"hotpotqa:{path}")
