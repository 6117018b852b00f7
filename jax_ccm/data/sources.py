"""Where records come from: JSONL and text files, files of others, tensorflow-datasets, and the generators.

Every source has random access, so that grain can shuffle and resume it by index.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import os
import pathlib
import re
import reprlib
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from jax_ccm.data.converters.table import CONVERTERS
from jax_ccm.errors import UserError, unknown
from jax_ccm.records import named, paths
from jax_ccm.records.parsing import Repeated, parse_json, require_text

Record = dict[str, Any]

# How a source begins that is a function of the user's own.
OWN = "python:"

# What each format reads from a record: field -> whether it is a list of strings. A trailing "?" marks an optional one.
FIELDS: dict[str, dict[str, bool]] = {
    "dialogue": {"turns": True, "system?": False},
    "online": {
        "contexts": True,
        "query": False,
        "target": False,
        "choices?": True,
        "answers?": True,
        "system?": False,
        "task?": False,
    },
    "fewshot": {"text": False, "label": False, "choices?": True},
    "text": {"text": False},
    "recall": {},
}


class Source(Protocol):
    """A sequence of records, named for messages and reports."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def where(self, index: int) -> str:
        """Names a record for error messages: file and line, or source and index."""
        ...


@dataclasses.dataclass(frozen=True)
class Records:
    """Records held in memory."""

    name: str
    records: Sequence[Record]
    locations: Sequence[str] | None = None
    # Of what was converted: (reason, place) of what became no record, and what was done to how many.
    dropped: Sequence[tuple[str, str]] = ()
    changed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def where(self, index: int) -> str:
        return self.locations[index] if self.locations else f"{self.name}[{index}]"


@dataclasses.dataclass(frozen=True)
class Computed:
    """Records computed on access."""

    name: str
    size: int
    record: Callable[[int], Record]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.record(index)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


def open_sources(sources: Iterable[str], format: str) -> list[Source]:
    """Opens source strings (see `DataConfig`); one with ``*`` gives several.

    Args:
      sources: the strings.
      format: a key of `FIELDS`; records are checked to have its fields.

    Raises:
      UserError: for a source that does not exist, cannot be read or is empty, and for a malformed record, with file and
        line. Records without text in one of their fields (`blank`) are for the format to count.
    """
    opened: list[Source] = []
    for source in sources:
        opened += _open(source, FIELDS[format], format)
    for source in opened:
        if not len(source):
            raise UserError(f"data source {source.name!r} holds no records; remove it or point it at data")
    if not opened:
        raise UserError("no data source was given; set data.train, data.validation or data.test")
    return opened


def _open(source: str, fields: dict[str, bool], format: str) -> list[Source]:
    scheme, _, rest = source.partition(":")
    openers = {"generated": _generated, "tfds": _tfds, OWN.rstrip(":"): _own}
    if scheme in openers:
        address, _, query = rest.partition("?")
        return [openers[scheme](source, address, _options(source, query), fields, format)]
    if scheme in CONVERTERS:
        address, _, query = rest.partition("?")
        given = _options(source, query)
        return [_converted(scheme, file, given, fields, format) for file in _files(address)]
    return [_local(paths.local(file, ("*.txt",)), fields) for file in _files(source)]


def _files(source: str) -> list[str]:
    """The files that a path names, several where it has ``*``."""
    if "*" not in source:
        return [source]
    files = _in_bucket(source) if paths.is_remote(source) else sorted(glob.glob(source, recursive=True))
    if not files:
        raise UserError(f"no file matches the data source {source!r}")
    return files


def _in_bucket(source: str) -> list[str]:
    """URLs of the files that a pattern in a bucket names."""
    folder, _, rest = source.partition("*")
    folder, _, start = folder.rpartition("/")
    if "**" in source:
        raise UserError(f"data source {source!r}: ** is not known in buckets; write a * for each folder")
    return sorted(str(path) for path in paths.of(folder).glob(f"{start}*{rest}"))


def _options(source: str, query: str) -> dict[str, str]:
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise UserError(
            f"data source {source!r}: cannot read its options ({error}); write ?name=value&name=value"
        ) from None
    if len(dict(pairs)) != len(pairs):
        raise UserError(f"data source {source!r} gives an option twice")
    return dict(pairs)


def _local(path: pathlib.Path, fields: dict[str, bool]) -> Source:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(
                f"data source '{path}' is a folder without .txt files; for JSONL give the files, '{path}/*.jsonl'"
            )
    elif not path.is_file():
        raise UserError(
            f"data source '{path}' does not exist. Allowed: a .jsonl or .txt file, a folder of .txt files, "
            f"tfds:NAME:SPLIT, generated:NAME?…, python:MODULE:FUNCTION?…, and NAME:FILE for {', '.join(CONVERTERS)}"
        )
    elif path.suffix == ".txt":
        files = [path]
    elif path.suffix == ".jsonl":
        return _jsonl(path, fields)
    else:
        raise UserError(
            f"data source '{path}' ends in {path.suffix!r}; allowed are .jsonl (one record a line) and .txt"
        )
    records = [{"text": _text(file)} for file in files]
    for file, record in zip(files, records, strict=True):
        _check(record, fields, str(file))
    return Records(str(path), records, [str(file) for file in files])


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _text(path: pathlib.Path) -> str:
    """The text of a file, without a byte order mark, its lines ended by line feeds."""
    content = _read(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {error.start} of the file); convert it") from None
    # As Python reads text files: what a tokenizer gets does not depend on where a file was written.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl(path: pathlib.Path, fields: dict[str, bool]) -> Source:
    records, locations = [], []
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped, but no line breaks.
    for number, line in enumerate(re.split(b"\r\n|\n|\r", _read(path)), 1):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        where = f"{path}:{number}"
        record = parse_json(line, where)
        _check(record, fields, where)
        records.append(record)
        locations.append(where)
    return Records(str(path), records, locations)


def _check(record: Any, fields: dict[str, bool], where: str) -> None:
    """Raises `UserError` unless the record has the fields; others are allowed and ignored."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
    for field, is_list in fields.items():
        name = field.rstrip("?")
        if name not in record:
            if field.endswith("?"):
                continue
            found = ", ".join(sorted(record)) or "none"
            raise UserError(f"{where}: the record has no field {name!r}, which this format reads (its fields: {found})")
        if isinstance(record, Repeated) and name in record.keys_twice:
            raise UserError(f"{where}: the record gives field {name!r} twice; keep one")
        value = record[name]
        strings = value if is_list else [value]
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            want = "a list of strings" if is_list else "a string"
            raise UserError(f"{where}: field {name!r} must be {want}, it is {reprlib.repr(value)}")
        for number, text in enumerate(strings):
            require_text(text, f"{where}: item {number} of field {name!r}" if is_list else f"{where}: field {name!r}")
    answer = "target" if "target" in fields else "label"
    if "choices" in record and "choices?" in fields and record[answer] not in record["choices"]:
        raise UserError(f"{where}: the {answer} {record[answer]!r} is not among the choices")


def blank(record: Record, format: str) -> bool:
    """Whether one of the texts that a format reads from a record is empty or white space: it would be no chunk."""
    for field, is_list in FIELDS[format].items():
        name = field.rstrip("?")
        # An empty system message, or name of a task, is none.
        if (
            name in record
            and name not in ("system", "task")
            and not all(text.strip() for text in (record[name] if is_list else [record[name]]))
        ):
            return True
    return False


def _generated(source: str, address: str, options: dict[str, str], fields: dict[str, bool], format: str) -> Source:
    from jax_ccm.data.generated import generate

    return Computed(source, *generate(source, address, options, format))


def _own(source: str, address: str, options: dict[str, str], fields: dict[str, bool], format: str) -> Source:
    """The records that a function of the user's returns."""
    what = f"data source {source!r}"
    function = named.function(address, what, (Records, Computed, Source))
    made = function(**named.arguments(function, options, what))
    for index in range(len(made)):
        _check(made[index], fields, made.where(index))
    return made


def _converted(name: str, file: str, options: dict[str, str], fields: dict[str, bool], format: str) -> Source:
    """What a converter makes of a file."""
    converter, what = CONVERTERS[name], f"data source '{name}:{file}'"
    if converter.format != format:
        raise UserError(
            f"{what} gives records for format {converter.format!r}, but data.format is {format!r}; set data.format: "
            f"{converter.format}"
        )
    path = paths.local(file)
    if not path.exists():
        raise UserError(f"{what}: there is no {path}. {name} reads {converter.about}")
    for option in options:
        if option not in converter.options:
            raise unknown(f"option of {what}:", option, converter.options)
    made = converter.convert(**named.arguments(converter.convert, {"path": str(path), **options}, what))
    if not made.records:
        reasons = "; ".join(f"{count} {reason}" for reason, count in Counter(r for r, _ in made.dropped).items())
        raise UserError(f"{what}: nothing of it can be used ({reasons or 'it is empty'})")
    for record, where in zip(made.records, made.places, strict=True):
        _check(record, fields, where)
    return Records(f"{name}:{file}", made.records, made.places, made.dropped, made.changed)


def prepared() -> tuple[pathlib.Path, list[tuple[str, list[str]]]]:
    """The default folder of tensorflow-datasets, and the data sets prepared in it: name with config, and splits."""
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("**/dataset_info.json")):
        # NAME[/CONFIG]/VERSION/dataset_info.json; of several versions the last is shown.
        splits = parse_json(file.read_bytes(), str(file)).get("splits", [])
        found[file.parent.parent.relative_to(folder).as_posix()] = [split["name"] for split in splits]
    return folder, sorted(found.items())


def _tfds(source: str, address: str, options: dict[str, str], fields: dict[str, bool], format: str) -> Source:
    """A data source of tensorflow-datasets. Needs no TensorFlow, and never downloads."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(
            f"data source {source!r} needs the package tensorflow-datasets; pip install 'jax-ccm[tfds]'"
        ) from None
    name, _, split = address.partition(":")
    if not name or not split:
        raise UserError(f"data source {source!r}: write tfds:NAME[/CONFIG]:SPLIT")
    data_dir = options.pop("data_dir", None)
    names = [field.rstrip("?") for field in fields]
    for option in options:
        if option not in names:
            raise unknown(f"option of {source!r}:", option, ("data_dir", *names))
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        info: Mapping[str, Any] = builder.info.features or {}  # pyright: ignore[reportAssignmentType]
        data = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    # The library raises whatever its internals raise (NotImplementedError, AssertionError, KeyError, ValueError, its
    # own DatasetNotFoundError...) for the same mistake: the set is not there in a form that has random access.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"data source {source!r} cannot be opened from {data_dir or 'the default folder of tensorflow-datasets'} "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). It is not downloaded here: "
            f"prepare it first in a format with random access, `tfds build {name} --file_format=array_record`, "
            "and give its folder as ?data_dir="
        ) from None

    def plain(feature: str, value: Any) -> Any:
        if isinstance(value, bytes):
            # What is not UTF-8 becomes half characters, which the check of the record names.
            return value.decode(errors="surrogateescape")
        if isinstance(value, str):
            return value
        # The number of a class: its name is the text.
        if hasattr(info[feature], "int2str"):
            return info[feature].int2str(int(value))
        return [plain(feature, item) for item in value] if hasattr(value, "__iter__") else value

    def record(index: int) -> Record:
        raw = data[index]
        found = {}
        for field in fields:
            feature = options.get(field.rstrip("?"), field.rstrip("?"))
            if feature in raw:
                found[field.rstrip("?")] = plain(feature, raw[feature])
        # Of what a record lacks, such a data set has an empty list.
        found = {name: value for name, value in found.items() if f"{name}?" not in fields or value}
        _check(found, fields, f"{source}[{index}]")
        return found

    return Computed(source, len(data), record)
