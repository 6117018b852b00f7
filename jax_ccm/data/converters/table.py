"""The formats that are read by name, ``NAME:PATH?option=value``, and where their data come from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from jax_ccm.data.converters import corpora, dialogues, long_memory, messages, paragraphs, tasks
from jax_ccm.data.converters.rows import Converted


@dataclasses.dataclass(frozen=True)
class Converter:
    """A format of others.

    Attributes:
      convert: a function of a path, whose other arguments are the options of the source.
      format: the ``data.format`` of the records that it makes.
      about: what it is, in a line.
      licence: of the data.
      citation: who is to be cited; "" for formats that no data set belongs to.
      splits: what is trained on, and what reported.
      seen: whether it was run on the official file.
    """

    convert: Callable[..., Converted]
    format: str
    about: str
    licence: str = "yours"
    citation: str = ""
    splits: str = "yours"
    seen: bool = False

    @property
    def options(self) -> dict[str, str]:
        """Name and default of each option."""
        _, *options = inspect.signature(self.convert).parameters.values()

        def written(value):
            return str(value).lower() if isinstance(value, bool) else str(value)

        return {option.name: written(option.default) for option in options}


CONVERTERS = {
    "openai": Converter(messages.openai, "dialogue", "messages of a user and an assistant, as OpenAI's API has them"),
    "sharegpt": Converter(
        messages.sharegpt, "dialogue", "conversations as ShareGPT and most fine-tuning tools have them"
    ),
    "dailydialog": Converter(
        dialogues.dailydialog,
        "dialogue",
        "everyday conversations of two people (DailyDialog)",
        "CC BY-NC-SA 4.0",
        "Li et al. 2017, arXiv 1710.03957",
        "the official train, validation and test",
    ),
    "soda": Converter(
        dialogues.soda,
        "dialogue",
        "conversations made from social situations (SODA)",
        "CC BY 4.0",
        "Kim et al. 2023, arXiv 2212.10465",
        "the official train, validation and test",
    ),
    "msc": Converter(
        dialogues.msc,
        "dialogue",
        "up to five sessions of the same two people (Multi-Session Chat)",
        "that of ParlAI's data, see there",
        "Xu et al. 2022, arXiv 2107.07567",
        "the official train, valid and test",
    ),
    "realtalk": Converter(
        dialogues.realtalk,
        "dialogue",
        "three weeks of messages between two people (REALTALK)",
        "see its repository",
        "Lee et al. 2025, arXiv 2502.13270",
        "reported only; all ten conversations are tests",
    ),
    "babilong": Converter(
        long_memory.babilong,
        "online",
        "facts between sentences of books, and a question (BABILong)",
        "Apache-2.0",
        "Kuratov et al. 2024, arXiv 2406.10149",
        "reported only; train on worlds of your own",
    ),
    "longmemeval": Converter(
        long_memory.longmemeval,
        "online",
        "a question behind sessions of a user with an assistant (LongMemEval)",
        "MIT",
        "Wu et al. 2025, arXiv 2410.10813",
        "reported only; all 500 questions are tests",
    ),
    "locomo": Converter(
        long_memory.locomo,
        "online",
        "questions about months of conversation of two people (LoCoMo)",
        "CC BY-NC 4.0",
        "Maharana et al. 2024, arXiv 2402.17753",
        "reported only; all ten conversations are tests",
    ),
    "kvpress": Converter(
        long_memory.kvpress,
        "online",
        "benchmarks in the columns of kvpress (RULER, LooGLE and others)",
        "that of each benchmark",
        "that of each benchmark, and Devoto et al. 2025",
        "reported only",
    ),
    "squad": Converter(
        paragraphs.squad,
        "online",
        "a question, its paragraph among those of the same article: RULER's qa_1 (SQuAD)",
        "CC BY-SA 4.0",
        "Rajpurkar et al. 2018, arXiv 1806.03822; Hsieh et al. 2024",
        "the official train; dev is reported",
    ),
    "hotpotqa": Converter(
        paragraphs.hotpotqa,
        "online",
        "a question that two paragraphs answer together, among others: RULER's qa_2 (HotpotQA)",
        "CC BY-SA 4.0",
        "Yang et al. 2018, arXiv 1809.09600; Hsieh et al. 2024",
        "the official train; dev is reported",
    ),
    "movielens": Converter(
        tasks.movielens,
        "online",
        "what somebody gives a movie, behind what they gave others (MovieLens)",
        "research use, no redistribution, not commercial",
        "Harper and Konstan 2015",
        "by user: 80 % train, 10 % validation, 10 % test",
    ),
    "lamp": Converter(
        tasks.lamp,
        "online",
        "what somebody would write or choose, behind what they did before (LaMP 1 to 7)",
        "CC BY-NC-SA 4.0; LaMP 6 needs a licence of its own",
        "Salemi et al. 2024, arXiv 2304.11406",
        "the official train and dev; the answers of test are not public",
    ),
    "metaicl": Converter(
        tasks.metaicl,
        "fewshot",
        "examples of a task, with their options (MetaICL)",
        "CC BY-NC 4.0, and that of each task",
        "Min et al. 2022, arXiv 2110.15943",
        "hr_to_lr of its paper: tasks with many examples to train, 26 others to test",
    ),
    "gsm8k": Converter(
        tasks.gsm8k,
        "online",
        "problems of arithmetic behind demonstrations (GSM8K)",
        "MIT",
        "Cobbe et al. 2021, arXiv 2110.14168",
        "the official train.jsonl and test.jsonl",
        seen=True,
    ),
    "wikitext": Converter(
        corpora.wikitext,
        "text",
        "articles of Wikipedia (WikiText-2 and -103)",
        "CC BY-SA 3.0",
        "Merity et al. 2017, arXiv 1609.07843",
        "the official train, validation and test",
    ),
    "pg19": Converter(
        corpora.pg19,
        "text",
        "books of before 1919 (PG-19)",
        "Apache-2.0; the books are in the public domain in the United States",
        "Rae et al. 2020, arXiv 1911.05507",
        "the official train, validation and test",
    ),
    "c4": Converter(
        corpora.c4,
        "text",
        "pages of the web (C4)",
        "ODC-BY",
        "Raffel et al. 2020, arXiv 1910.10683",
        "the official train and validation",
    ),
}
