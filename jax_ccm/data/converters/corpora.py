"""Corpora of plain text: articles, books and pages, one text each."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from jax_ccm.data.converters.rows import Converted, json_lines, lines, rows
from jax_ccm.errors import UserError

# The title of an article; sections have more equals signs.
_TITLE = re.compile(r" ?= ([^=].*?) = ?")


def wikitext(path: str) -> Converted:
    """WikiText-2 and -103 (Merity et al. 2017): an article is a text, as the file has it.

    Args:
      path: ``wiki.train.raw``, ``wiki.test.tokens`` and the like; or a .parquet, .json or .jsonl file with a line of
        them in each ``text``.
    """
    made = Converted()
    article: list[str] = []
    start = path
    for place, line, title in _lines_of_wikitext(path):
        if title:
            _add(made, article, start)
            article, start = [], place
        article.append(line)
    _add(made, article, start)
    return made


def _add(made: Converted, article: list[str], place: str) -> None:
    text = "\n".join(article).strip()
    if text:
        made.add({"text": text}, place)


def _lines_of_wikitext(path: str) -> Iterator[tuple[str, str, bool]]:
    """Place and text of each line, and whether it is a title: it stands between empty lines."""
    if path.endswith((".parquet", ".json", ".jsonl")):
        found = [(row.place, row.text("text").rstrip("\n")) for row in rows(Path(path))]
    else:
        found = list(lines(Path(path)))
    empty = [not line.strip() for _, line in found]
    for number, (place, line) in enumerate(found):
        alone = (number == 0 or empty[number - 1]) and (number + 1 == len(found) or empty[number + 1])
        yield place, line, alone and _TITLE.fullmatch(line) is not None


def pg19(path: str) -> Converted:
    """PG-19 (Rae et al. 2020): a book is a text.

    Args:
      path: the folder of a split, with a .txt for each book; one such file; or a .parquet, .json or .jsonl file with a
        book in each ``text``.
    """
    made, place = Converted(), Path(path)
    if place.is_dir() and not list(place.glob("*.txt")):
        raise UserError(f"{path} is a folder without .txt files; PG-19 has one for each book of a split")
    if place.is_dir() or place.suffix == ".txt":
        for file in sorted(place.glob("*.txt")) if place.is_dir() else [place]:
            _add(made, [line for _, line in lines(file)], str(file))
        return made
    return _texts(made, rows(place))


def c4(path: str) -> Converted:
    """C4 (Raffel et al. 2020): a page is a text.

    Args:
      path: ``c4-train.00000-of-01024.json.gz`` and the like, as they come or unpacked: a JSON object a line.
    """
    made, file = Converted(), Path(path)
    if file.suffix != ".gz":
        return _texts(made, rows(file, lines_of_json=(".json",)))
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}; get it again") from None
    return _texts(made, json_lines(content, path))


def _texts(made: Converted, found) -> Converted:
    for row in found:
        made.add({"text": row.text("text")}, row.place)
    return made
