"""Conversations of two people, as dialogues: what the papers of this field train on, and talk over many sessions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jax_ccm.data.converters.rows import Converted, at_least, lines, rows, sessions

# Ends every utterance in the official file.
END_OF_UTTERANCE = "__eou__"


def dailydialog(path: str) -> Converted:
    """DailyDialog (Li et al. 2017): a dialogue a line, ``__eou__`` behind each utterance.

    Args:
      path: ``dialogues_train.txt`` and the like; or a .parquet, .json or .jsonl file whose field ``dialog`` has the
        utterances.
    """
    made = Converted()
    if path.endswith(".txt"):
        for place, line in lines(Path(path)):
            if line.strip():
                _add(made, line.split(END_OF_UTTERANCE), place)
    else:
        for row in rows(Path(path)):
            _add(made, row.texts("dialog"), row.place)
    return made


def soda(path: str) -> Converted:
    """SODA (Kim et al. 2023): a dialogue a row, its utterances in ``dialogue``.

    Args:
      path: ``train.parquet`` and the like; .json and .jsonl are read, too.
    """
    made = Converted()
    for row in rows(Path(path)):
        _add(made, row.texts("dialogue"), row.place)
    return made


def msc(path: str, turns: int = 0) -> Converted:
    """Multi-Session Chat (Xu et al. 2022): the sessions before, and that of the file, as one dialogue.

    Args:
      path: ``msc_dialogue/session_4/train.txt`` and the like, with a JSON object a line; or .jsonl, .json, .parquet.
      turns: most of a dialogue: longer ones become several, cut between turns; 0 for any number.
    """
    at_least(0, turns=turns)
    made = Converted()
    for row in rows(Path(path), lines_of_json=(".txt",)):
        before = row.inside("previous_dialogs") if "previous_dialogs" in row.content else []
        said = [turn.text("text") for talk in (*before, row) for turn in talk.inside("dialog")]
        _add(made, said, row.place, turns)
    return made


def realtalk(path: str, turns: int = 0) -> Converted:
    """REALTALK (Lee et al. 2025): weeks of messages between two people as one dialogue.

    Messages in a row by one of them are a turn, and messages without text, such as pictures alone, are left out.

    Args:
      path: ``Chat_1_Emi_Elise.json`` and the like.
      turns: as for `msc`.
    """
    at_least(0, turns=turns)
    made = Converted()
    for row in rows(Path(path)):
        said: list[tuple[str, str]] = []
        for message in (message for number in sessions(row) for message in row.inside(f"session_{number}")):
            speaker, text = message.text("speaker"), " ".join(message.text("clean_text").split())
            if not text:
                made.changed["messages without text left out"] += 1
            elif said and said[-1][0] == speaker:
                made.changed["messages joined to the one before"] += 1
                said[-1] = (speaker, f"{said[-1][1]} {text}")
            else:
                said.append((speaker, text))
        _add(made, [text for _, text in said], row.place, turns)
    return made


def _add(made: Converted, said: Sequence[str], place: str, most: int = 0) -> None:
    """Adds a dialogue, or several of up to ``most`` turns."""
    turns = [re.sub(r"\s+", " ", text).strip() for text in said]
    turns = [text for text in turns if text]
    if len(turns) < 2:
        made.drop("with fewer than two turns", place)
        return
    most = most or len(turns)
    for first in range(0, len(turns), most):
        part = turns[first : first + most]
        if len(part) > 1:
            made.add({"turns": part}, place if most >= len(turns) else f"{place} from turn {first + 1}")
        else:
            made.changed["without a last turn that was left alone"] += 1
