"""Whether data measure what they are meant to: what stands in two splits, and how alike questions and answers are."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping, Sequence

from jax_ccm.data.config import DataConfig
from jax_ccm.data.sources import FIELDS, Record, Source, open_sources
from jax_ccm.errors import UserError


def lines(config: DataConfig) -> Iterator[str]:
    """What there is to say of a config's data: of each split and each two (`shared`), and of questions (`questions`).

    Raises:
      UserError: for data that cannot be read, or are not texts.
    """
    if config.format == "recall":
        raise UserError("data.format 'recall' has no texts to compare; its splits are told apart by their seeds")
    given = {"train": config.train, "validation": config.validation, "test": config.test}
    splits = {name: open_sources(sources, config.format) for name, sources in given.items() if sources}
    if not splits:
        raise UserError("the config names no data; set data.train, data.validation or data.test")
    yield from shared(splits, config.format)
    if config.format == "online":
        for name, sources in splits.items():
            yield from (f"{name}: {line}" for line in questions(sources))


def key(record: Record, format: str) -> str:
    """What a record says, without case and white space: equal for records that a model could not tell apart."""
    # A question mark ends the names of fields that a record may lack.
    names = [name.rstrip("?") for name in FIELDS[format]]
    return re.sub(r"\s+", " ", repr([record.get(name) for name in names]).lower())


def records(sources: Sequence[Source]) -> Iterator[tuple[str, Record]]:
    """Place and content of each record."""
    for source in sources:
        yield from ((source.where(index), source[index]) for index in range(len(source)))


def shared(splits: Mapping[str, Sequence[Source]], format: str) -> Iterator[str]:
    """A line for each two splits, and for each by itself: the records that stand in both, or more than once.

    Args:
      splits: the sources of each.
      format: a key of `FIELDS` with texts.
    """
    seen: dict[str, dict[str, str]] = {}
    for name, sources in splits.items():
        own: dict[str, str] = {}
        twice: list[str] = []
        for place, record in records(sources):
            said = key(record, format)
            if said in own:
                twice.append(place)
            own.setdefault(said, place)
        total = sum(map(len, sources))
        yield f"{name}: {total:,} records, {_counted(len(twice), total, 'say what another of them says', twice)}"
        for other, known in seen.items():
            both = [place for said, place in own.items() if said in known]
            yield f"{name} and {other}: {_counted(len(both), len(own), f'of {name} stand in {other}, too', both)}"
        seen[name] = own


def _counted(count: int, total: int, what: str, places: Sequence[str]) -> str:
    if not count:
        return f"none {what}"
    return f"WARNING: {count:,} ({count / max(total, 1):.1%}) {what} (the first: {places[0]})"


def questions(sources: Sequence[Source]) -> Iterator[str]:
    """Lines on how far the questions of online records are answered by their own conversations alone.

    Args:
      sources: of format "online".
    """
    found = [record for _, record in records(sources)]

    def plain(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    shorts = [[plain(text) for text in record.get("answers") or [record["target"]]] for record in found]
    # With spaces at both ends, so that answers are found as whole words only.
    contexts = [f" {plain(' '.join(record['contexts']))} " for record in found]

    def told(own, context):
        return any(f" {short} " in context for short in own)

    inside = [told(own, context) for own, context in zip(shorts, contexts, strict=True)]
    # The conversation half of all away: another one, if there are two.
    away = [contexts[(number + (len(found) + 1) // 2) % len(found)] for number in range(len(found))]
    elsewhere = [told(own, context) for own, context in zip(shorts, away, strict=True)]

    def share(hits):
        return f"{sum(hits) / len(found):.0%}"

    others = f", and in {share(elsewhere)} of others" if len(found) > 1 else ""
    yield f"the answer stands, word for word, in {share(inside)} of the own conversations{others}"
    asked = collections.Counter(plain(record["query"]) for record in found)
    answered = collections.Counter(own[0] for own in shorts)
    by_question: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record, own in zip(found, shorts, strict=True):
        by_question[plain(record["query"])][own[0]] += 1
    guessed = sum(counts.most_common(1)[0][1] for counts in by_question.values())
    yield f"{len(asked):,} different questions and {len(answered):,} different answers in {len(found):,} records"
    ((often, count),) = answered.most_common(1)
    yield f"the most frequent answer, {often!r}, is right for {count / len(found):.0%}"
    repeated = sum(counts.total() for counts in by_question.values() if counts.total() > 1)
    if repeated:
        # To a question that is asked once its own answer is always the most frequent one, which says nothing.
        alone = len(by_question) - sum(counts.total() > 1 for counts in by_question.values())
        yield (
            f"{repeated:,} questions are asked more than once; the most frequent answer to each is right for "
            f"{(guessed - alone) / repeated:.0%} of those: what somebody knows who remembers no conversation"
        )
