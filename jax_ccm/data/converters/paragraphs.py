"""Questions about paragraphs, hidden among other paragraphs at any length: RULER's two tasks of this kind.

RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3) puts the paragraphs that answer a question among others of the
same data set. Paragraphs are numbered in the order in which they stand.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jax_ccm.data import haystack
from jax_ccm.data.converters.rows import Converted, at_least, rows
from jax_ccm.errors import UserError

# Draws of a random paragraph before a search for one that is not there yet ends: nearly all of them are there.
_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class _Question:
    """A question, the paragraphs that answer it, and others that are about the same (numbers of paragraphs)."""

    place: str
    name: str
    query: str
    answers: Sequence[str]
    needed: Sequence[int]
    near: Sequence[int]


def squad(path: str, words: int = 400, chunk: int = 64, seed: int = 0) -> Converted:
    """SQuAD (Rajpurkar et al. 2016, 2018) as RULER's first task: the paragraph stands among those of its article.

    Questions that no paragraph answers (version 2) are left out and counted.

    Args:
      path: ``dev-v2.0.json``, ``dev-v1.1.json`` or ``train-…``.
      words: of a record, about; never fewer than the paragraphs that are needed.
      chunk: most words of a context.
      seed: of the draws, which depend on the question as well.
    """
    return _converted("squad", path, _of_squad, words, chunk, seed)


def hotpotqa(path: str, words: int = 400, chunk: int = 64, seed: int = 0) -> Converted:
    """HotpotQA (Yang et al. 2018) as RULER's second task: two paragraphs together answer, and stand among others.

    Args:
      path: ``hotpot_dev_distractor_v1.json`` or ``hotpot_train_v1.1.json``.
      words, chunk, seed: as for `squad`.
    """
    return _converted("hotpotqa", path, _of_hotpotqa, words, chunk, seed)


def _of_squad(path: Path, texts: list[str], made: Converted) -> Iterator[_Question]:
    articles = [article for row in rows(path) for article in row.inside("data")]
    for article in articles:
        paragraphs = article.inside("paragraphs")
        numbers = range(len(texts), len(texts) + len(paragraphs))
        texts += [paragraph.text("context") for paragraph in paragraphs]
        for number, paragraph in zip(numbers, paragraphs, strict=True):
            for asked in paragraph.inside("qas"):
                # In version 1 every question has an answer, and nothing says so.
                if asked.content.get("is_impossible") is True:
                    made.drop("that no paragraph answers", asked.place)
                    continue
                answers = list(dict.fromkeys(answer.text("text").strip() for answer in asked.inside("answers")))
                near = [other for other in numbers if other != number]
                yield _Question(asked.place, asked.said("id"), asked.text("question"), answers, [number], near)


def _of_hotpotqa(path: Path, texts: list[str], made: Converted) -> Iterator[_Question]:
    places: dict[str, int] = {}
    for row in rows(path):
        titles, numbers = [], []
        for title, said in row.pairs("context"):
            if not isinstance(title, str) or not isinstance(said, list) or not all(isinstance(x, str) for x in said):
                raise UserError(f"{row.place}: each entry of field 'context' must be a title and a list of sentences")
            text = f"{title}\n{''.join(said).strip()}"
            # The same paragraph stands with several questions.
            if text not in places:
                places[text] = len(texts)
                texts.append(text)
            titles.append(title)
            numbers.append(places[text])
        needed = {title for title, _ in row.pairs("supporting_facts")}
        if missing := sorted(map(str, needed - set(titles))):
            made.drop("whose paragraphs are not there", f"{row.place} ({missing[0]})")
            continue
        given = dict(zip(titles, numbers, strict=True))
        found = [number for title, number in given.items() if title in needed]
        near = [number for title, number in given.items() if title not in needed]
        yield _Question(row.place, row.said("_id"), row.text("question"), [row.text("answer").strip()], found, near)


def _converted(
    task: str,
    path: str,
    questions: Callable[[Path, list[str], Converted], Iterator[_Question]],
    words: int,
    chunk: int,
    seed: int,
) -> Converted:
    """A record for each question that a file holds."""
    at_least(1, words=words)
    at_least(4, chunk=chunk)
    made, texts = Converted(), []
    # All paragraphs first: what stands around a question may come from anywhere.
    for asked in list(questions(Path(path), texts, made)):
        if not asked.query.strip() or not asked.needed or not all(asked.answers) or not asked.answers:
            made.drop("without a question, an answer or a paragraph", asked.place)
            continue
        rng = random.Random(f"{task}/{seed}/{asked.name}")
        shown = _among(asked, texts, words, rng)
        said = [f"Document {number}: {' '.join(texts[at].split())}" for number, at in enumerate(shown, 1)]
        needed = [number for number, at in enumerate(shown) if at in asked.needed]
        contexts, begins = haystack.contexts(said, needed, chunk)
        record = {"contexts": contexts, "query": asked.query, "target": asked.answers[0], "task": task}
        made.add(record | {"answers": list(asked.answers), "age": len(contexts) - begins[0]}, asked.place)
    return made


def _among(asked: _Question, texts: Sequence[str], words: int, rng: random.Random) -> list[int]:
    """The paragraphs of a record, in an order that is drawn: what is needed, what is near, and any others."""
    shown = dict.fromkeys(asked.needed)
    room = words - sum(len(texts[number].split()) for number in shown)
    near = sorted(asked.near, key=lambda _: rng.random())
    for _ in range(_DRAWS):
        if room <= 0 or len(shown) == len(texts):
            break
        number = near.pop() if near else int(rng.random() * len(texts))
        if number not in shown:
            shown[number] = None
            room -= len(texts[number].split())
    return sorted(shown, key=lambda _: rng.random())
