"""Which data there are, in lines."""

from __future__ import annotations

from collections.abc import Iterator

from jax_ccm.data.converters.table import CONVERTERS
from jax_ccm.data.generated import COMMON, GENERATED, SPLITS
from jax_ccm.data.sources import FIELDS, prepared


def lines() -> Iterator[str]:
    """Formats and sources, in lines."""

    def written(options):
        return "?" + "&".join(f"{name}={value}" for name, value in options.items())

    yield "formats of records (data.format), and the fields that each reads"
    for format, fields in FIELDS.items():
        names = [f"{name}{' (texts)' if several else ''}" for name, several in fields.items()]
        yield f"  {format:<10} {', '.join(names) or 'only generated ones'}"
    yield f"\ngenerated data sets; all take {written(COMMON)}; splits: {', '.join(SPLITS)}, which share nothing"
    for name, kind in GENERATED.items():
        yield f"  generated:{name + written(kind.options)}"
        yield f"      {kind.format}: {kind.about}"
    yield "\nfiles in formats of others (.jsonl, .json, .parquet), read by name; docs/sources.md tells of each"
    for name, kind in CONVERTERS.items():
        yield f"  {name}:PATH{written(kind.options) if kind.options else ''}"
        yield f"      {kind.format}: {kind.about}"
    folder, found = prepared()
    yield f"\nprepared data sets of tensorflow-datasets in {folder}"
    yield from (f"  tfds:{name}:SPLIT   splits: {', '.join(splits)}" for name, splits in found)
    if not found:
        yield "  none; `tfds build NAME --file_format=array_record` prepares one, ?data_dir= names another folder"
    yield "\nfiles, also in buckets: FILE.jsonl, one record a line; FILE.txt or a folder, one text each; * in names"
    yield "of your own: python:package.module:function?name=value"
