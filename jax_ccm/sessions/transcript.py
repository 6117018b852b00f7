"""What was said, written down as it grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.records import paths


class Record:
    """The conversation as ``chat.json``, whole after each turn."""

    def __init__(self, folder: Path | None):
        """Begins a record; None keeps none.

        Raises:
          UserError: if the folder cannot be written to.
        """
        self._path = None if folder is None else folder / "chat.json"
        self._entries: list[dict[str, Any]] = []
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise UserError(f"--workdir {folder}: {error.strerror}; give a folder that can be written to") from None

    @property
    def refused(self) -> bool:
        """Whether a turn was not answered."""
        return any("refused" in entry for entry in self._entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a turn."""
        self._entries.append(entry)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        text = json.dumps(self._entries, indent=2, ensure_ascii=False) + "\n"
        # Half a character becomes \udcXX, which JSON reads back as what it was.
        paths.write(self._path, text.encode("utf-8", "backslashreplace"))
