"""Training data that are tokenised once and kept: a data set of tensorflow-datasets on disk, read at random access.

A folder holds ``units/1.0.0/``, the data set (ArrayRecord, a split for each source of the config, in its order);
``built.json``, written last, of what it was made and how large its files are; and beside them, measured once for each
layout of rows, what each unit needs of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.data.config import DataConfig
from jax_ccm.data.counts import NothingLeft, Report
from jax_ccm.data.formats import Format
from jax_ccm.data.sources import Record, Source, open_sources
from jax_ccm.data.units import Unit
from jax_ccm.errors import UserError
from jax_ccm.records import paths
from jax_ccm.records.parsing import parse_json
from jax_ccm.rules.describe import describe_method
from jax_ccm.rules.types import Method

VERSION = 1
BUILT, DATA = "built.json", "units"
# So many records are read and tokenised at a time, so that a corpus need not fit into memory.
BLOCK = 4096
# Fields that decide neither which units there are nor what they need of a row.
_IRRELEVANT = (
    "weights", "validation", "test", "demonstrations", "batch_size", "buckets", "join", "uncompressed", "shuffle_seed",
    "tokenized", "max_tokens_evaluation", "truncate", "tokens", "scored",
)  # fmt: skip
# Of a unit, besides its name: what of it is there, and int32 arrays.
_ARRAYS = ("tokens", "lengths", "scored", "start", "begins")

# Units, what each needs of a row (int64 ``[units, 3]``: places, slots, scored tokens), and what became of the records.
Part = tuple[Sequence[Unit], np.ndarray, Report]


def measured(format: Format, method: Method, units: Sequence[Unit]) -> np.ndarray:
    """The largest sizes that any draw of each unit needs: int64 ``[units, 3]``, places, slots and scored tokens."""
    found = (format.needs(unit, method) for unit in units)
    return np.array([(need.tokens, need.memory, need.scored) for need in found], np.int64).reshape(-1, 3)


def digest_of(units: Iterable[Unit]) -> Any:
    """A hash of all tokens of the units in their order."""
    digest = hashlib.sha256()
    for unit in units:
        # With counts in front, so that the same tokens cut elsewhere are another digest.
        digest.update(b"%d:" % len(unit.pieces))
        for piece in unit.pieces:
            digest.update(b"%d:" % len(piece) + piece.astype("<i4").tobytes())
        if unit.marked is not None:
            digest.update(f"scored {sorted(unit.marked)}".encode())
    return digest


def require_known(units: Sequence[Unit], vocab: int) -> int:
    """The largest token id of the units.

    Raises:
      UserError: for one outside the vocabulary.
    """
    largest = -1
    for unit in units:
        top = max(int(piece.max()) for piece in unit.pieces)
        if top >= vocab:
            raise UserError(
                f"{unit.id}: token id {top} is outside the model's vocabulary (0..{vocab - 1}); "
                f"ids from {vocab} on are compression tokens, which the method places itself. "
                "Is this the model's own tokenizer?"
            )
        largest = max(largest, top)
    return largest


@dataclasses.dataclass(frozen=True)
class _Block:
    """Neighbouring records of a source. What a converter left out is told with the first ones."""

    source: Source
    first: int
    end: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dropped(self) -> Sequence[tuple[str, str]]:
        return getattr(self.source, "dropped", ()) if self.first == 0 else ()

    @property
    def changed(self) -> Any:
        return getattr(self.source, "changed", {}) if self.first == 0 else {}

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> Record:
        return self.source[self.first + index]

    def where(self, index: int) -> str:
        return self.source.where(self.first + index)


def _blocks(source: str, format: str) -> Iterator[_Block]:
    for opened in open_sources([source], format):
        yield from (_Block(opened, first, min(first + BLOCK, len(opened))) for first in range(0, len(opened), BLOCK))


def build(
    config: DataConfig, method: Method, format: Format, tokenizer: Any, vocab: int, log: Callable[[str], None] = print
) -> Path:
    """Tokenises the training data of a config into the folder that its ``tokenized`` names.

    Args:
      config: the data config.
      method: whose needs of a row are measured at once; others measure theirs when they are first trained.
      format: the config's.
      tokenizer: a fast tokenizer of transformers.
      vocab: V of the model.
      log: gets a line for each source.

    Returns:
      The folder.

    Raises:
      UserError: for a folder that is not empty, data that cannot be read or of which nothing is left, a format whose
        examples are drawn from several records, or a missing package.
    """
    folder = _folder(config)
    if _kind(format) is None:
        raise UserError(
            f"data.format {config.format!r} is not tokenised beforehand: its examples are put together from several "
            "records, or made of tokens already; train on its sources themselves"
        )
    # Nothing of the user's is overwritten, nor removed below.
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        done = "holds tokenised data" if (folder / BUILT).is_file() else "is not an empty folder"
        raise UserError(f"data.tokenized: {folder} {done}; name another, or remove it to build it again")
    own = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    made = _Build(config, format, method, vocab, folder, log)
    try:
        made.write()
    # Also when it is interrupted: what was begun here would be in the way of the next attempt.
    except BaseException:
        shutil.rmtree(folder if own else folder / DATA, ignore_errors=True)
        raise
    built = {
        "version": VERSION,
        "made_from": _made_from(config, tokenizer),
        "largest_token": made.largest,
        "digest": made.digest.hexdigest(),
        "sources": [
            {"units": sum(map(len, needs)), "report": vars(report)}
            for needs, report in zip(made.needs, made.reports, strict=True)
            if report is not None
        ],
        "files": {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)},
    }
    _keep_needs(folder, config, method, np.concatenate([own for needs in made.needs for own in needs]))
    # Last: a folder without it was never finished.
    paths.write(folder / BUILT, json.dumps(built, indent=1).encode())
    return folder


class _Build:
    """A data set as it is written."""

    def __init__(self, config, format, method, vocab, folder, log):
        self.config, self.format, self.method, self.vocab = config, format, method, vocab
        self.folder, self.log, self.out = folder, log, sys.stdout
        self.digest, self.largest = hashlib.sha256(), -1
        # Of each source: what its units need of a row, and what became of its records.
        self.needs: list[list[np.ndarray]] = [[] for _ in config.train]
        self.reports: list[Report | None] = [None] * len(config.train)

    def write(self) -> None:
        tfds = _tensorflow_datasets()
        features = {"id": tfds.features.Text(), "has": tfds.features.Sequence(tfds.features.Text())}
        features |= {name: tfds.features.Sequence(np.int32) for name in _ARRAYS}
        outer = self

        # No data set of this name shall be found by others.
        with tfds.core.registered.skip_registration():

            class Units(tfds.core.GeneratorBasedBuilder):
                """Tokenised training data."""

                VERSION = tfds.core.Version("1.0.0")

                def _info(self):
                    # In the order in which they are made, which is that of the needs.
                    # Shuffled by training, which reads at random.
                    return tfds.core.DatasetInfo(
                        builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                    )

                def _split_generators(self, dl_manager):
                    return {name: self._generate_examples(records) for name, records in outer.splits()}

                def _generate_examples(self, records):
                    yield from records

        tfds.disable_progress_bar()
        # The library says that it downloads, which it does not; what is logged here is heard nonetheless.
        self.out = sys.stdout
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as nothing:
            Units(data_dir=self.folder, file_format="array_record").download_and_prepare(download_dir=nothing)

    def splits(self) -> Iterator[tuple[str, Iterator[tuple[int, dict[str, Any]]]]]:
        """A split for each source of which something is left."""
        found = False
        for number, source in enumerate(self.config.train):
            records = self.units(number, source)
            # tensorflow-datasets makes no split without records. To ask for the first one tokenises the first block.
            if first := next(records, None):
                found = True
                yield _split(number), itertools.chain([first], records)
        if not found:
            reports = "; ".join(map(str, self.reports))
            raise NothingLeft("training", reports)

    def units(self, number: int, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The units of a source as records of the data set."""
        count = 0
        for block in _blocks(source, self.config.format):
            units, report = self.format.load([block])
            before = self.reports[number]
            self.reports[number] = report if before is None else before.joined(report)
            self.largest = max(self.largest, require_known(units, self.vocab))
            self.needs[number].append(measured(self.format, self.method, units))
            for unit in units:
                # In the order in which they are written.
                self.digest.update(digest_of([unit]).digest())
                arrays = unit.stored()
                yield count, {"id": unit.id, "has": list(arrays)} | {name: arrays.get(name, ()) for name in _ARRAYS}
                count += 1
        with contextlib.redirect_stdout(self.out):
            self.log(f"{source}: {self.reports[number]}")


def _split(number: int) -> str:
    return f"source_{number}"


def _tensorflow_datasets() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(
            "tokenised data are kept by the package tensorflow-datasets; pip install 'jax-ccm[tfds]'"
        ) from None
    return tfds


def _folder(config: DataConfig) -> Path:
    if not config.tokenized:
        raise UserError("data.tokenized names no folder; add --data.tokenized DIR")
    if paths.is_remote(config.tokenized):
        raise UserError(
            f"data.tokenized is {config.tokenized!r}; tokenised data are read from a folder of this machine, so copy "
            "it here, or mount it"
        )
    return Path(config.tokenized)


def _kind(format: Format) -> type[Unit] | None:
    return getattr(format, "unit", None)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / DATA).rglob("*") if file.is_file())


def _made_from(config: DataConfig, tokenizer: Any) -> dict[str, Any]:
    """What decides which units there are: sources, options of the format, and the tokenizer."""
    names = [name for name in ["train", *config.decides_units] if name not in _IRRELEVANT]
    given = {f"data.{name}": getattr(config, name) for name in names}
    # What it does and not its name, under which it may be found elsewhere: normaliser, pre-tokenizer and merges decide
    # as much as the vocabulary. How texts are cut off and padded does not, and whoever used it before may have set it.
    tree = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    whole = json.dumps([tree, str(tokenizer.chat_template or "")], sort_keys=True)
    given["tokenizer"] = hashlib.sha256(whole.encode()).hexdigest()[:16]
    # As it comes back from a file: tuples are lists there.
    return json.loads(json.dumps(given))


def _needs_file(config: DataConfig, method: Method) -> str:
    """Of a layout of rows."""
    given = {name: value for name, value in dataclasses.asdict(config).items() if name not in _IRRELEVANT}
    key = json.dumps([given, describe_method(method)], sort_keys=True, default=str)
    return f"needs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"


def _keep_needs(folder: Path, config: DataConfig, method: Method, needs: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, needs.astype(np.int32))
    paths.write(folder / _needs_file(config, method), buffer.getvalue())


class _Split(Sequence[Unit]):
    """The units of some splits of a data set, read and taken apart when they are asked for."""

    def __init__(self, data: Any, kind: type[Unit], folder: Path):
        self._data, self._kind, self._folder = data, kind, folder

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index):
        index = range(len(self))[index]
        try:
            found = self._data[index]
        # Whatever the reader of the file raises where it is damaged.
        except Exception as error:
            raise UserError(
                f"data.tokenized: unit {index} of {self._folder} cannot be read ({error}); remove it, and build it "
                "again"
            ) from None
        has = [name.decode() for name in found["has"]]
        return self._kind.restored(found["id"].decode(), {name: np.array(found[name], np.int32) for name in has})


@dataclasses.dataclass(frozen=True)
class Stored:
    """Training data that `build` has tokenised.

    Attributes:
      folder: where.
      built: what stands in its ``built.json``.
      kind: the class of its units.
      digest: of all of them.
    """

    folder: Path
    built: dict[str, Any]
    kind: type[Unit]
    digest: str

    @classmethod
    def open(cls, config: DataConfig, format: Format, tokenizer: Any) -> Stored:
        """Opens the folder that a config names, without reading its sources.

        Raises:
          UserError: for a folder that is not there, was never finished or is damaged, or that was built from other
            sources, with other options of the format, or for another tokenizer.
        """
        folder = _folder(config)
        kind = _kind(format)
        if kind is None or not (folder / BUILT).is_file():
            state = "was never finished; remove it, and build it" if folder.is_dir() else "does not exist; build it"
            raise UserError(
                f"data.tokenized: {folder} {state} by python -m jax_ccm.prepare build, with the same config and options"
            )
        built = parse_json((folder / BUILT).read_bytes(), str(folder / BUILT))
        if not isinstance(built, dict) or built.get("version") != VERSION:
            raise UserError(f"{folder / BUILT} is of another version of jax_ccm, or damaged; build it again")
        for name, size in built["files"].items():
            file = folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
                raise UserError(f"data.tokenized: {file} {state}; remove {folder}, and build it again")
        then, now = built["made_from"], _made_from(config, tokenizer)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise UserError(
                    f"data.tokenized: {folder} was built with {name} {then.get(name)!r}, but now it is "
                    f"{now.get(name)!r}; put that back, build another folder, or train on the sources themselves "
                    "(--data.tokenized None)"
                )
        return cls(folder, built, kind, built["digest"])

    def require(self, vocab: int) -> None:
        """Refuses data with tokens outside a vocabulary."""
        if self.built["largest_token"] >= vocab:
            raise UserError(
                f"data.tokenized: {self.folder} holds token id {self.built['largest_token']}, which is outside the "
                f"model's vocabulary (0..{vocab - 1})"
            )

    def needs(self, config: DataConfig, format: Format, method: Method) -> np.ndarray:
        """What each unit needs of a row, int64 ``[units, 3]``; measured now, and kept, where it was not before."""
        file = self.folder / _needs_file(config, method)
        counts = [source["units"] for source in self.built["sources"]]
        try:
            found = np.load(file).astype(np.int64)
        # Not there, or damaged: it only saves work.
        except (OSError, ValueError, EOFError):
            found = np.zeros((0, 3), np.int64)
        # Of another shape it is no answer for these units, and is measured again.
        if found.shape == (sum(counts), 3):
            return found
        found = measured(format, method, self._read(range(len(counts))))
        try:
            _keep_needs(self.folder, config, method, found)
        except OSError as error:
            print(f"data.tokenized: what units need of a row is measured each time ({error})")
        return found

    def part(self, numbers: range, needs: np.ndarray) -> Part:
        """The units of some sources of the config, by their numbers there, of the ``needs`` of all."""
        counts = [source["units"] for source in self.built["sources"]]
        # The needs stand source by source.
        begin = sum(counts[: numbers.start])
        reports = [Report.of(self.built["sources"][number]["report"]) for number in numbers]
        own = needs[begin : begin + sum(counts[number] for number in numbers)]
        return self._read(numbers), own, functools.reduce(Report.joined, reports)

    def _read(self, numbers: Iterable[int]) -> Sequence[Unit]:
        # Sources of which nothing was left have no split.
        splits = [_split(number) for number in numbers if self.built["sources"][number]["units"]]
        if not splits:
            return []
        builder = _tensorflow_datasets().builder_from_directory(self.folder / DATA / "1.0.0")
        return _Split(builder.as_data_source("+".join(splits)), self.kind, self.folder)
