"""The formats that are read by name, ``NAME:PATH?option=value``, and where their data come from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from jax_ccm.data.converters import long_memory, messages, tasks
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
    "movielens": Converter(
        tasks.movielens,
        "online",
        "what somebody gives a movie, behind what they gave others (MovieLens)",
        "research use, no redistribution, not commercial",
        "Harper and Konstan 2015",
        "by user: 80 % train, 10 % validation, 10 % test",
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
}
