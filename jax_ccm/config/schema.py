"""Experiments as frozen dataclasses, read from YAML and overridden on the command line.

A config names everything that a run depends on. Unknown keys, wrong types and repeated keys are errors that give the
path of the key; nothing is coerced except whole numbers where a float is meant.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.config import arguments
from jax_ccm.config.sections import (
    AdapterSource,
    CacheConfig,
    EvalConfig,
    MeshConfig,
    MethodConfig,
    ModelSource,
    OptimizerConfig,
    TrainConfig,
    own_method,
)
from jax_ccm.config.yaml import convert, read_yaml
from jax_ccm.data.config import BY_FORMAT, DataConfig, DialogueConfig, kind_of, own_options
from jax_ccm.errors import UserError
from jax_ccm.numerics import Precision
from jax_ccm.records import named, output, paths
from jax_ccm.records.card import CardConfig
from jax_ccm.rules.objective import Objective

# Keys that had another name: the section, the name of an earlier version, and today's.
RENAMED = (("model", "dtype", "precision"), ("method", "fewest", "min_comp_tokens"))


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelSource = ModelSource()
    method: MethodConfig = MethodConfig()
    adapter: AdapterSource = AdapterSource()
    data: DataConfig = DialogueConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: Objective = Objective()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    cache: CacheConfig = CacheConfig()
    mesh: MeshConfig = MeshConfig()
    card: CardConfig = CardConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config.

    Args:
      path: a YAML file.
      overrides: command-line arguments such as ``["--optimizer.learning_rate", "3e-4"]``.

    Raises:
      UserError: for a file that cannot be read, bad YAML, an unknown key, or a value that cannot be.
      SystemExit: for an override of an unknown key or a wrong type.
    """
    config = from_mapping(read_yaml(path))
    if overrides:
        config, overrides = in_format(config, overrides)
        config = arguments.parse(Config, overrides, default=config, prog=str(path))
    check(config)
    return config


def check(config: Config) -> None:
    """Refuses sections that do not go together; what each of them cannot be, it refuses itself.

    Args:
      config: with all overrides, which may be what makes them fit.

    Raises:
      UserError: naming the key, its value and what is allowed.
    """
    model, data, train = config.model, config.data, config.train
    continued = config.eval.by == "continuation"
    if continued and data.format != "text":
        raise UserError(
            f"eval.by 'continuation' goes on with plain text: data.format is {data.format!r}; set it to 'text'"
        )
    if config.eval.reply_tokens and data.format in ("text", "recall") and not continued:
        raise UserError(
            f"eval.reply_tokens is {config.eval.reply_tokens}, and data.format {data.format!r} asks nothing "
            "that a reply could answer; set it to 0, or evaluate dialogues, online or few-shot records"
        )
    if config.eval.by == "stream" and (data.format != "text" or data.draws_spans):
        raise UserError(
            f"eval.by 'stream' reads plain text: it needs data.format 'text' without data.ratio, not {data.format!r}"
        )
    if model.precision != "auto" and Precision.of(model.precision).params != "float32" and train.trainable == "all":
        raise UserError(
            f"train.trainable is 'all' with model.precision {model.precision!r}: small updates would be lost in "
            "rounding. Use float32, auto or params=float32,compute=bfloat16,output=float32, or train the adapter "
            "(always float32)"
        )
    if data.buckets and config.optimizer.accumulation > 1:
        raise UserError(
            f"optimizer.accumulation={config.optimizer.accumulation} needs micro-batches of one shape, and "
            "data.buckets gives several; use a larger data.batch_size, or leave data.buckets empty"
        )
    # The base is often named on the command line alone.
    if model.rope_length is not None and not model.source:
        raise UserError("model.rope_length is given, but a model from scratch has no scaled rope; leave it out")
    if model.revision and (not model.source or "@" in model.source):
        raise UserError(
            f"model.revision is {model.revision!r}, and model.source {model.source!r}; a revision is that of a source "
            "on the hub, and is given once"
        )
    if config.adapter.merge and not model.source:
        raise UserError("adapter.merge needs a pretrained base (model.source); a model from scratch has no first stage")


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Builds a config from nested dicts, strictly; `check` is not done, as overrides may follow.

    Raises:
      UserError: naming the path of the offending key.
    """
    tree = _with_new_names(tree)
    # What depends on a value is a field of a class that the value chooses; the command line knows it by the type.
    own: dict[str, Any] = {}
    method, data = (tree.get(name) if isinstance(tree, Mapping) else None for name in ("method", "data"))
    name = method.get("name") if isinstance(method, Mapping) else None
    if isinstance(name, str) and named.is_named(name):
        own["method"] = convert(own_method(name), method, "method")
    if isinstance(data, Mapping):
        own["data"] = _data(data)
    rest = {name: value for name, value in tree.items() if name not in own} if own else tree
    return dataclasses.replace(convert(Config, rest), **own)


def _data(given: Mapping[str, Any]) -> DataConfig:
    """The data of a config, strictly."""
    # Earlier versions wrote the options of all formats, and nothing for those that were not set.
    optional = {name for kind in BY_FORMAT.values() for name in own_options(kind)}
    given = {name: value for name, value in given.items() if value is not None or name not in optional}
    return convert(kind_of(given), given, "data")


def in_format(config: Config, args: Sequence[str]) -> tuple[Config, list[str]]:
    """A config whose data have the options of the format that a command line names, for tyro to know them.

    Returns:
      The config, and the arguments without those that unset what only other formats read: ``--data.min_turns None``.

    Raises:
      UserError: if the config sets an option that this format does not have, and the arguments do not unset it.
    """
    format, before = config.data.format, config.data
    for number, arg in enumerate(args):
        if arg == "--data.format":
            format = next(iter(args[number + 1 :]), "")
        elif arg.startswith("--data.format="):
            format = arg.split("=", 1)[1]
    if format not in BY_FORMAT:  # tyro refuses it
        return config, list(args)
    gone = {name for kind in BY_FORMAT.values() for name in own_options(kind)} - set(own_options(BY_FORMAT[format]))
    gone, args = _unset(gone, args)
    if format == before.format:
        return config, args
    given = {field.name: getattr(before, field.name) for field in dataclasses.fields(before)}
    given = {name: value for name, value in given.items() if value != getattr(type(before), name) and name not in gone}
    kind = kind_of({**given, "format": format})
    # As it is, unchecked: what else the command line says may be what makes it fit.
    data = object.__new__(kind)
    values = {field.name: given.get(field.name, field.default) for field in dataclasses.fields(kind)}
    data.__dict__.update(values, format=format)
    return dataclasses.replace(config, data=data), args


def _unset(names: Collection[str], args: Sequence[str]) -> tuple[set[str], list[str]]:
    """Those of some options of the data that a command line sets to None, and its other arguments."""
    found, rest, left = set(), [], list(args)
    while left:
        arg = left.pop(0)
        name, equals, value = arg.partition("=")
        name = name.removeprefix("--data.") if name.startswith("--data.") else ""
        if name in names and (value if equals else next(iter(left), "")) == "None":
            found.add(name)
            # A value that is an argument of its own goes with the name.
            left = left[not equals :]
        else:
            rest.append(arg)
    return found, rest


def _with_new_names(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tree of an earlier version under the names of this one, said in a line for each."""
    for section, old, new in RENAMED:
        given = tree.get(section) if isinstance(tree, Mapping) else None
        if not isinstance(given, Mapping) or old not in given:
            continue
        was, now = f"{section}.{old}", f"{section}.{new}"
        if new in given:
            raise UserError(f"{was} is the old name of {now}, and both are given; leave {was} out")
        if given[old] is not None:
            print(f"note: {was}: {given[old]} of an earlier version is read as {now}", file=sys.stderr)
        tree = {**tree, section: {new if name == old else name: value for name, value in given.items()}}
    return tree


def to_mapping(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values (tuples become lists): what `from_mapping` reads."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    """A value without tuples."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML of which `load_config` makes an equal one."""
    return output.yaml_text(to_mapping(config))


def save_config(config: Config, path: str | Path) -> None:
    """Writes `to_yaml` of a config to a file."""
    paths.write(path, to_yaml(config).encode())
