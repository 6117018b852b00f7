"""The formats that are read by name, ``NAME:PATH?option=value``, and where their data come from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from jax_ccm.data.converters import messages
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
        written = lambda value: str(value).lower() if isinstance(value, bool) else str(value)
        return {option.name: written(option.default) for option in options}


CONVERTERS = {
    "openai": Converter(messages.openai, "dialogue", "messages of a user and an assistant, as OpenAI's API has them"),
    "sharegpt": Converter(
        messages.sharegpt, "dialogue", "conversations as ShareGPT and most fine-tuning tools have them"
    ),
}
