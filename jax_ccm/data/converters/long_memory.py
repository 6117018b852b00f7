"""Benchmarks of long memories, as questions behind contexts that come one by one."""

from __future__ import annotations

import re
from pathlib import Path

from jax_ccm.data.converters.messages import ASSISTANT, USER, Message, Unusable, in_turns
from jax_ccm.data.converters.rows import (
    Converted,
    Fields,
    at_least,
    chosen,
    closed_set,
    kept_words,
    pieces,
    rows,
    sessions,
)  # fmt: skip
from jax_ccm.errors import UserError, unknown

TYPES = (
    "single-session-user", "single-session-assistant", "single-session-preference", "temporal-reasoning",
    "knowledge-update", "multi-session", "abstention",
)  # fmt: skip
# Of LoCoMo: multi-hop, temporal, open domain, single-hop, and questions for what was never said.
CATEGORIES = ("1", "2", "3", "4", "5")
NEVER_SAID = "Not mentioned in the conversation"


def babilong(path: str, words: int = 64, choices: int = 12) -> Converted:
    """BABILong (Kuratov et al. 2024): facts of bAbI between sentences of books, ``{"input", "question", "target"}``.

    Args:
      path: a .parquet, .json or .jsonl file of one task and length.
      words: most words of a context.
      choices: most different targets of a file for them to be the choices of every question; 0 for none.
    """
    at_least(1, words=words)
    made = Converted()
    for row in rows(Path(path)):
        target = row.said("target")
        contexts = pieces(row.text("input"), words)
        made.add({"contexts": contexts, "query": row.text("question"), "target": target}, row.place)
    closed_set(made, choices)
    return made


def longmemeval(path: str, type: str = "any", words: int = 0) -> Converted:
    """LongMemEval (Wu et al. 2025): a question behind the dated sessions of a user and an assistant.

    Every message is a context; the user's first of a session begins with its date, and so does the question.

    Args:
      path: ``longmemeval_s.json`` or another of its files.
      type: of questions, or several with commas; any: all but those that the history does not answer (abstention).
      words: of longer messages, so many words are kept, and it is counted; 0 keeps all.
    """
    wanted = TYPES[:-1] if type == "any" else chosen("type of LongMemEval's questions:", type, TYPES)
    made = Converted()
    for row in rows(Path(path)):
        kind = row.text("question_type")
        if kind not in TYPES:
            raise unknown(f"type in {row.place}: field 'question_type' is", kind, TYPES[:-1])
        kind = "abstention" if row.text("question_id").endswith("_abs") else kind
        if kind not in wanted:
            made.drop("of another type" + (", abstention" if kind == "abstention" and type == "any" else ""), row.place)
            continue
        contexts = _sessions(row, made, words)
        answer = row.said("answer")
        query = f"[{row.text('question_date')}] {row.text('question')}"
        record = {"contexts": contexts, "query": query, "target": answer, "task": kind}
        made.add(record, f"{row.place} ({kind})")
    return made


def _sessions(row: Fields, made: Converted, words: int) -> list[str]:
    talks, dates = row.lists("haystack_sessions"), row.texts("haystack_dates")
    if len(talks) != len(dates):
        raise UserError(f"{row.place}: there are {len(talks)} haystack_sessions, but {len(dates)} haystack_dates")
    if all(re.match(r"\d{4}/\d\d/\d\d", date) for date in dates):
        talks = [talks[number] for number in sorted(range(len(dates)), key=dates.__getitem__)]
        dates = sorted(dates)
    contexts = []
    for talk, date in zip(talks, dates, strict=True):
        said = []
        for message in talk:
            role = message.text("role")
            if role not in (USER, ASSISTANT):
                raise unknown(f"role in {message.place}: field 'role' is", role, (USER, ASSISTANT))
            said.append(Message(role, kept_words(message.text("content"), words, made, "messages")))
        try:
            turns = [turn.text for turn in in_turns([turn for turn in said if turn.text.strip()], made)]
        except Unusable:
            made.changed["without a session in which not both speak"] += 1
            continue
        contexts += [f"[{date}] {turns[0]}", *turns[1:]]
    return contexts


def locomo(path: str, category: str = "1,2,3,4") -> Converted:
    """LoCoMo (Maharana et al. 2024): questions about months of conversation; every turn is a context.

    A turn names its speaker, the first of a session its date, and a picture is told by its caption.

    Args:
      path: ``locomo10.json``.
      category: of questions, several with commas: 1 multi-hop, 2 temporal, 3 open domain, 4 single-hop; 5 alone, which
        asks for what was never said, with the wrong answer and "not mentioned" as choices.
    """
    wanted = chosen("category of LoCoMo's questions:", category, CATEGORIES)
    if "5" in wanted and len(wanted) > 1:
        raise UserError(f"the option category={category}: questions of category 5 have choices, ask them by themselves")
    made = Converted()
    for row in rows(Path(path)):
        contexts = _two_people(Fields.of(row.get("conversation"), f"{row.place}: conversation"))
        for question in row.inside("qa"):
            kind = question.said("category")
            if kind not in CATEGORIES:
                raise unknown(f"category in {question.place}: field 'category' is", kind, CATEGORIES)
            if kind not in wanted:
                made.drop("of another category", question.place)
                continue
            record = {"contexts": contexts, "query": question.text("question"), "task": f"category {kind}"}
            if kind == "5":
                wrong = question.said("adversarial_answer")
                record |= {"target": NEVER_SAID, "choices": [NEVER_SAID, wrong]}
            else:
                record["target"] = question.said("answer")
            made.add(record, f"{question.place} (category {kind})")
    return made


def _two_people(talk: Fields) -> list[str]:
    contexts = []
    for number in sessions(talk):
        date = talk.text(f"session_{number}_date_time")
        for place, turn in enumerate(talk.inside(f"session_{number}")):
            caption = turn.content.get("blip_caption")
            text = turn.text("text") + (f" [shares a picture: {turn.text('blip_caption')}]" if caption else "")
            head = f"[{date}] " if place == 0 else ""
            contexts.append(f"{head}{turn.text('speaker')}: {text.strip()}")
    return contexts


def kvpress(path: str, words: int = 64, task: str = "any") -> Converted:
    """Benchmarks in kvpress's columns: ``{"context", "question", "answer_prefix", "answer", "max_new_tokens"}``.

    With several answers all of them, with commas, are the target. ``answer_prefix`` stands behind the question;
    ``max_new_tokens`` is not read: ``eval.reply_tokens`` says how long replies may get.

    Args:
      path: a .parquet, .json or .jsonl file.
      words: most words of a context.
      task: takes only rows whose field ``task`` is this.
    """
    at_least(1, words=words)
    made = Converted()
    cut: dict[str, list[str]] = {}
    for row in rows(Path(path)):
        if task != "any" and row.text("task") != task:
            made.drop("of another task", row.place)
            continue
        context = row.text("context")
        if context not in cut:
            cut[context] = pieces(context, words)
        query = "\n".join(part for name in ("question", "answer_prefix") if (part := row.text(name).strip()))
        target = ", ".join(row.texts("answer"))
        record = {"contexts": cut[context], "query": query, "target": target}
        made.add(record | ({"task": row.text("task")} if "task" in row.content else {}), row.place)
    return made
