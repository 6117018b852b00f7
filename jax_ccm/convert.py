"""``python -m jax_ccm.convert FROM TO --format peft``: an adapter from one format to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from jax_ccm.config import cli
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.records.paths import Folder


@dataclasses.dataclass(frozen=True)
class Options:
    """Converts an adapter between our own format, PEFT's layout and the format of the CCM paper's code.

    The format of the source is told from its files. Files of the paper's code do not say which method they are for;
    for them give --method and what it was trained with. No base model is loaded: what the source says of its base is
    kept, and a source that says nothing stays without.
    """

    source: Annotated[Folder, tyro.conf.Positional]
    """Folder of the adapter."""
    target: Annotated[Folder, tyro.conf.Positional]
    """Folder to write."""
    format: Literal["own", "peft", "reference"] = "own"
    """Format to write."""
    method: str | None = None
    """The method the adapter was trained for, if its files do not say: ccm_concat, ccm_merge, gist, full, ..."""
    comp_tokens: int | None = None
    """Compression tokens after each chunk."""
    sink: bool | None = None
    """Whether the first token of a session was visible to all."""
    independent: bool | None = None
    """Whether chunks did not see earlier memory."""
    conditional: bool | None = None
    """Whether the LoRA acts on compression tokens only."""


def main(argv: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, prog="python -m jax_ccm.convert", use_underscores=True)
    from jax_ccm.rules.describe import describe_method, label
    from jax_ccm.weights.adapters import read_adapter, write_adapter
    from jax_ccm.weights.peft import is_conditional

    names = ("comp_tokens", "sink", "independent", "conditional")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if given and options.method is None:
        raise UserError(f"--{next(iter(given))} describes a method; name it: --method ccm_concat, for instance")
    method = build(options.method, **given) if options.method is not None else None
    if options.source.resolve() == options.target.resolve():
        raise UserError(f"source and target are both {options.source}; give another folder to write")
    adapter = read_adapter(options.source, method=method)
    if adapter.method is None and method is not None:
        adapter = dataclasses.replace(adapter, method=describe_method(method))
    path = write_adapter(options.target, adapter, format=options.format)
    config = adapter.config
    trained = label(adapter.method) if adapter.method else "unknown"
    base = (adapter.base or {}).get("name") or "unknown"
    print(
        f"wrote {path} ({options.format}): rank {config.rank}, alpha {config.alpha:g}, {config.tokens} compression "
        f"tokens; method {trained}; base model {base}"
    )
    if options.format == "peft" and is_conditional(adapter):
        print(
            "note: this LoRA acts on compression tokens only, and PEFT would run it on all tokens: loaded there it is "
            "not what was trained. adapter_config.json has a field that makes PEFT say so"
        )
    elif options.format == "peft" and config.tokens:
        print("note: PEFT passes over the embeddings of compression tokens, which lie in the same file")


if __name__ == "__main__":
    cli.run(main)
