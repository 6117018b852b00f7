"""What people rated, and problems with demonstrations, as questions behind contexts that come one by one."""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

from jax_ccm.data.converters.rows import Converted, at_least, rows
from jax_ccm.errors import UserError, unknown

SPLITS = ("train", "validation", "test")
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
