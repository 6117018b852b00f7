"""``python -m jax_ccm.convert FROM TO --format peft``: an adapter, or a memory, from one format to another."""

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
    kept, and a source that says nothing stays without. The config that lies beside the source goes along, and a model
    card is written of all that is recorded: with --results that of an adapter to give away.

    FIRST.ccm BOTH.ccm --merge SECOND.ccm makes one memory of two, the second conversation behind the first, where the
    method has a meaning for it: appended slots, and means.

    MEMORY.ccm PREFIX.safetensors --format dynamic_cache makes a memory a prefix that PyTorch users prepend:
    transformers takes it as past_key_values. PREFIX.safetensors MEMORY.ccm makes it a memory again.
    """

    source: Annotated[Folder, tyro.conf.Positional]
    """Folder of the adapter; or a memory file, or a prefix."""
    target: Annotated[Folder, tyro.conf.Positional]
    """Folder to write; or the memory file, or the prefix."""
    format: Literal["own", "peft", "reference", "dynamic_cache"] = "own"
    """Format to write: of an adapter, own, peft or reference; of a memory, own or dynamic_cache."""
    merge: Folder | None = None
    """A memory file that is put behind the source, which is one, too."""
    stored: Literal["float32", "bfloat16"] = "float32"
    """Type of the numbers in the file; bfloat16 rounds them, and halves its size. In memory they are float32."""
    base: str = ""
    """Where others find the base, if not where it was in training: model.source of the config that goes along."""
    results: tuple[Folder, ...] = ()
    """Files results.json of jax_ccm.evaluate, for the model card."""
    card: Folder | None = None
    """A config whose section `card` takes the place of the adapter's own."""
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
    # A memory is a file, an adapter a folder.
    if options.merge is not None or options.source.is_file():
        _convert_memory(options)
        return
    if options.format == "dynamic_cache":
        raise UserError(f"dynamic_cache is a format of memories, and {options.source} is no memory file")
    # Imported here: a memory needs none of it, and --help is there at once.
    from jax_ccm.config.adapters import FILE, chosen, config_beside, open_config
    from jax_ccm.config.schema import Config, to_yaml
    from jax_ccm.evals import card
    from jax_ccm.rules.describe import describe_method, label
    from jax_ccm.weights.adapters import Adapter
    from jax_ccm.weights.peft import is_conditional

    names = ("comp_tokens", "sink", "independent", "conditional")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if given and options.method is None:
        raise UserError(f"--{next(iter(given))} describes a method; name it: --method ccm_concat, for instance")
    method = build(options.method, **given) if options.method is not None else None
    _require_another(options, "folder")
    results = [card.read_results(path) for path in options.results]
    adapter, config = Adapter.read(options.source, method=method), config_beside(options.source)
    if options.base and config is None:
        raise UserError(f"--base is for the config of an adapter, and {options.source} lies there without one")
    said = open_config(str(options.card)).card if options.card is not None else (config or Config()).card
    if config is not None:
        # A revision belongs to the source that it was given with.
        model = dataclasses.replace(config.model, source=options.base, revision="") if options.base else config.model
        config = dataclasses.replace(config, model=model, card=said)
    # What the files say of their method holds before what is given; `Adapter.read` has compared the two.
    if adapter.method is None and method is not None:
        adapter = dataclasses.replace(adapter, method=describe_method(method))
    text = card.model_card(
        options.target.name, adapter, recipe=None if config is None else chosen(config), said=said, results=results
    )
    beside = {card.FILE: text.encode()} | ({} if config is None else {FILE: to_yaml(config).encode()})
    try:
        path = adapter.write(options.target, format=options.format, stored=options.stored, beside=beside)
    except OSError as e:
        # Not its own file name: what is written stands beside the folder until it is whole.
        raise UserError(f"{options.target} cannot be written: {e.strerror}; give a folder that can be") from e
    shape = adapter.config
    trained = label(adapter.method) if adapter.method else "unknown"
    base = (adapter.base or {}).get("name") or "unknown"
    print(
        f"wrote {path} ({options.format}): rank {shape.rank}, alpha {shape.alpha:g}, {shape.tokens} compression "
        f"tokens; method {trained}; base model {base}"
    )
    if options.format == "peft" and is_conditional(adapter):
        print(
            "note: this LoRA acts on compression tokens only, and PEFT would run it on all tokens: loaded there it is "
            "not what was trained. adapter_config.json has a field that makes PEFT say so"
        )
    elif options.format == "peft" and shape.tokens:
        print("note: PEFT passes over the embeddings of compression tokens, which lie in the same file")


def _require_another(options: Options, what: str) -> None:
    if options.source.resolve() == options.target.resolve():
        raise UserError(f"source and target are both {options.source}; give another {what} to write")


def _convert_memory(options: Options) -> None:
    """Two memories as one, a memory as a prefix, or a prefix as a memory."""
    from jax_ccm.memory import files, prefixes
    from jax_ccm.memory.merging import merge

    _require_another(options, "file")
    if options.merge is not None and options.format == "own":
        files.write(merge(files.read(options.source), files.read(options.merge)), options.target)
        print(f"wrote {options.target}: {options.source}, and {options.merge} behind it")
    elif options.merge is not None:
        raise UserError(f"--merge makes a memory, and --format is {options.format}; do one, and then the other")
    elif prefixes.is_prefix(options.source):
        files.write(prefixes.read(options.source), options.target)
        print(f"wrote {options.target}: the memory that {options.source} was made of")
    elif options.format == "dynamic_cache":
        held = files.read(options.source)
        prefixes.write(held, options.target)
        print(f"wrote {options.target}: {len(held.arrays['kind'])} slots, for transformers' past_key_values")
        if prefixes.runs(held) != "base":
            print("note: its LoRA acts on text, too: in PyTorch, load the adapter (--format peft) beside the base")
    else:
        raise UserError(f"{options.source} is a file: --merge another memory into it, or give --format dynamic_cache")


if __name__ == "__main__":
    cli.run(main)
