"""What is personal, and tasks with demonstrations, as questions behind contexts that come one by one."""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

from jax_ccm.data.converters.rows import Converted, Fields, at_least, closed_set, kept_words, rows
from jax_ccm.errors import UserError, unknown

SPLITS = ("train", "validation", "test")
# How an entry of a profile is said, by the fields that it has: the first that are all there count.
ENTRIES: dict[tuple[str, ...], str] = {
    ("description", "tag"): 'the tag for the movie: "{description}" is "{tag}"',
    ("text", "category"): 'the category for the article: "{text}" is "{category}"',
    ("text", "score"): '{score} is the score for "{text}"',
    ("text", "title"): '"{title}" is the title for "{text}"',
    ("abstract", "title"): '"{title}" is the title for "{abstract}"',
    ("text",): '"{text}"',
}
# LaMP's tasks with a closed set of answers: two references, tags of movies, stars, and categories of news.
CLOSED = ("LaMP_1", "LaMP_2", "LaMP_2N", "LaMP_2M", "LaMP_3")
# User, movie, rating, time.
Rating = tuple[str, str, str, float]


def movielens(path: str, split: str = "train", history: int = 16) -> Converted:
    """MovieLens (Harper and Konstan 2015) as personalisation: what somebody gives the next movie.

    A user's ratings, in order of their time, are cut into windows: ``history`` contexts, and the rating that follows.

    Args:
      path: the folder of ``ml-latest-small``, ``ml-32m`` and the like (ratings.csv, movies.csv), of ``ml-1m``
        (ratings.dat, movies.dat) or of ``ml-100k`` (u.data, u.item).
      split: of the users, by a digest of their number: "train" 80 %, "validation" 10 %, "test" 10 %.
      history: ratings before the one that is asked for.
    """
    at_least(1, history=history)
    if split not in SPLITS:
        raise unknown("value of the option split:", split, SPLITS)
    titles, ratings = _movielens(Path(path))
    by_user: dict[str, list[Rating]] = {}
    for rating in ratings:
        by_user.setdefault(rating[0], []).append(rating)
    given = sorted({rating for _, _, rating, _ in ratings}, key=float)
    made = Converted()
    for user, own in by_user.items():
        if _split_of(user) != split:
            continue
        own.sort(key=lambda rating: rating[3])
        if len(own) <= history:
            made.drop(f"of users with {history} ratings or fewer", f"{path} user {user}")
        for first in range(0, len(own) - history, history + 1):
            *before, (_, asked, target, _) = own[first : first + history + 1]
            contexts = [f"{titles.get(movie, movie)}: {rating}" for _, movie, rating, _ in before]
            record = {"contexts": contexts, "query": f"{titles.get(asked, asked)}:", "target": target}
            made.add(record | {"choices": given}, f"{path} user {user} from rating {first}")
    return made


def _split_of(user: str) -> str:
    number = int(hashlib.sha256(user.encode()).hexdigest(), 16) % 10
    return SPLITS[max(number - 7, 0)]


def _movielens(folder: Path) -> tuple[dict[str, str], list[Rating]]:
    """Titles by movie, and all ratings."""
    kinds = {
        "ratings.csv": ("movies.csv", ",", ",", "utf-8-sig"),
        "ratings.dat": ("movies.dat", "::", "::", "latin-1"),
        "u.data": ("u.item", "\t", "|", "latin-1"),
    }
    found = next((name for name in kinds if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no MovieLens: a folder with {', '.join(kinds)} beside its movies is needed")
    movies, between, between_titles, encoding = kinds[found]
    titles = {}
    for number, fields in _table(folder / movies, between_titles, encoding, 3):
        if found == "ratings.csv" and number == 1:
            continue
        genres = fields[2].replace("|", ", ")
        titles[fields[0]] = fields[1] + (f" ({genres})" if found != "u.data" and "no genres" not in genres else "")
    ratings = []
    for number, fields in _table(folder / found, between, encoding, 4):
        if found == "ratings.csv" and number == 1:
            continue
        try:
            float(fields[2])
            ratings.append((fields[0], fields[1], fields[2].removesuffix(".0"), float(fields[3])))
        except ValueError:
            raise UserError(f"{folder / found}:{number}: rating and time must be numbers: {fields[2:4]}") from None
    return titles, ratings


def _table(path: Path, between: str, encoding: str, fewest: int) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line."""
    try:
        with path.open(encoding=encoding, newline="") as file:
            lines = csv.reader(file) if between == "," else (line.rstrip("\r\n").split(between) for line in file)
            for number, fields in enumerate(lines, 1):
                if len(fields) < fewest:
                    raise UserError(f"{path}:{number}: {len(fields)} fields, at least {fewest} are needed")
                yield number, fields
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def lamp(path: str, profile: int = 16, words: int = 80, seed: int = 0) -> Converted:
    """LaMP 1 to 7 (Salemi et al. 2024): what somebody wrote or chose before, and what they would now.

    Each context is an entry of the profile, in a sentence (Kim et al. 2024, appendix A, for LaMP-2). Where a task has a
    closed set of answers they are the choices.

    Args:
      path: ``train_questions.json`` or ``dev_questions.json``; its ``_outputs.json`` lies beside it.
      profile: most entries, drawn from the profile; the first k of them are also those of ``profile=k``.
      words: of longer texts, so many words are kept, and it is counted; 0 keeps all.
      seed: of the draw, which depends on the user as well.
    """
    at_least(1, profile=profile)
    task, golds = _lamp_answers(Path(path))
    made = Converted()
    for row in rows(Path(path)):
        user = row.said("id")
        entries = row.inside("profile")
        if user not in golds:
            raise UserError(f"{row.place}: the outputs have no answer to {user!r}; both files must be of one split")
        if not entries:
            made.drop("without a profile", row.place)
            continue
        drawn = random.Random(f"{seed} {user}").sample(entries, len(entries))[:profile]
        contexts = [_entry(entry, words, made) for entry in drawn]
        record = {"contexts": contexts, "query": row.text("input"), "target": golds[user], "task": task}
        made.add(record, f"{row.place} (id {user})")
    if task in CLOSED:
        closed_set(made, 20)
    return made


def _lamp_answers(questions: Path) -> tuple[str, dict[str, str]]:
    """The task, and the answers by id, of the file beside the questions."""
    beside = questions.with_name(questions.name.replace("questions", "outputs"))
    if beside == questions:
        raise UserError(f"{questions}: LaMP's questions are in a file like dev_questions.json, beside dev_outputs.json")
    found = list(rows(beside))
    if len(found) != 1:
        raise UserError(f"{beside} must hold one object, with fields 'task' and 'golds'")
    (outputs,) = found
    return outputs.text("task"), {gold.said("id"): gold.said("output") for gold in outputs.inside("golds")}


def _entry(entry: Fields, words: int, made: Converted) -> str:
    """An entry of a profile, as a sentence."""
    for names, form in ENTRIES.items():
        if all(name in entry.content for name in names):
            said = {name: kept_words(entry.said(name).strip(), words, made, "texts of profiles") for name in names}
            return form.format(**said)
    found = ", ".join(sorted(entry.content)) or "none"
    raise UserError(
        f"{entry.place}: an entry of a profile has a text, an abstract or a description (this one: {found})"
    )


def metaicl(path: str) -> Converted:
    """MetaICL (Min et al. 2022): an example of a task a line, ``{"task", "input", "output", "options"}``.

    Args:
      path: ``data/TASK/TASK_16_100_test.jsonl`` and the like; each file is a task.
    """
    made = Converted()
    for row in rows(Path(path)):
        record: dict[str, object] = {"text": row.text("input").strip(), "label": row.text("output").strip()}
        # In the order of the file, each once.
        options = dict.fromkeys(option.strip() for option in row.texts("options"))
        if len(options) > 1:
            record["choices"] = list(options)
        made.add(record, row.place)
    return made


def gsm8k(path: str, demonstrations: str = "", shots: int = 8, seed: int = 0) -> Converted:
    """GSM8K (Cobbe et al. 2021) behind demonstrations: contexts are their questions and answers, by turns.

    ``<<6*7=42>>`` of the answers is left out; the number behind ``####`` is the short answer.

    Args:
      path: ``test.jsonl`` or ``train.jsonl``: ``{"question", "answer"}``.
      demonstrations: the file from which they are drawn; "" for the others of the same file.
      shots: how many.
      seed: of the draw, which depends on the place of the question as well.
    """
    at_least(0, shots=shots)
    asked = list(_problems(path))
    shown = list(_problems(demonstrations)) if demonstrations else asked
    if shots > len(shown) - (shown is asked):
        raise UserError(f"{demonstrations or path} has {len(shown)} problems, too few for {shots} demonstrations")
    made = Converted()
    texts = {question for question, _, _ in shown} if shown is not asked else set()
    for number, (question, answer, place) in enumerate(asked):
        if question in texts:
            made.changed["whose question is among the demonstrations of others, too"] += 1
        drawn = random.Random(f"{seed} {number}").sample(range(len(shown)), min(shots + 1, len(shown)))
        others = [shown[i] for i in drawn if shown[i][0] != question][:shots]
        contexts = [text for one in others for text in one[:2]]
        record = {"contexts": contexts, "query": question, "target": answer}
        if short := re.search(r"####\s*(\S+)\s*$", answer):
            record["answers"] = [short[1].replace(",", "")]
        made.add(record, place)
    return made


def _problems(path: str) -> Iterator[tuple[str, str, str]]:
    for row in rows(Path(path)):
        yield row.text("question").strip(), re.sub(r"<<[^>]*>>", "", row.text("answer")).strip(), row.place
