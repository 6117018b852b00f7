"""``results.json`` and ``comparison.json``, whichever version wrote them, in the form of this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.records import output
from jax_ccm.records.parsing import read_json


def read(file: Path) -> dict[str, Any]:
    """The content of a JSON file that a command wrote for others to read.

    Raises:
      UserError: if it is missing or damaged, or a newer version wrote it.
    """
    content = read_json(file)
    schema = content.get("schema", 1)
    # Exactly int: True would pass as 1.
    if type(schema) is not int or not 1 <= schema <= output.SCHEMA:
        raise UserError(
            f"{file} is of schema {schema!r}, and this version of jax_ccm reads 1 to {output.SCHEMA}; update jax_ccm, "
            "or run the command that wrote it again with this one"
        )
    if schema == 1 and {"steps", "systems"} <= content.keys():
        try:
            _migrate(content)
        except (AttributeError, KeyError, TypeError) as e:
            raise UserError(f"{file} lacks something that its command writes ({e!r}); run it again") from None
    return content


def _migrate(content: dict[str, Any]) -> None:
    """From schema 1: whole texts were a time step "text"; a comparison had its cells by the names of steps."""
    steps = [row["step"] for row in content["steps"]]
    if "config" not in content:  # a comparison
        for run in (run for several in content["systems"].values() for run in several):
            run["steps"] = [run["steps"][str(step)] for step in steps]
    # A task may have that name, too.
    if steps == ["text"] and content.get("config", {}).get("eval", {}).get("by") != "task":
        content["steps"][0]["step"] = None
