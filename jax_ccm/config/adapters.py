"""The experiment that an adapter belongs to: the config that lies beside its files, and is found by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_ccm.config.schema import Config, from_mapping, to_mapping
from jax_ccm.config.sections import MeshConfig
from jax_ccm.config.yaml import read_yaml
from jax_ccm.data.sources import OWN
from jax_ccm.errors import UserError
from jax_ccm.records import named
from jax_ccm.weights.sources import locate_adapter

FILE = "config.yaml"


def open_config(given: str) -> Config:
    """The config that the first argument of a command names.

    Args:
      given: a YAML file; or an adapter (its folder, the name of one that comes with the library, or a hub id), whose
        own config is taken and which that config then loads.

    Raises:
      UserError: if there is nothing of that name, or the adapter lies there without its config.
    """
    if given.endswith((".yaml", ".yml")):
        return from_mapping(read_yaml(given))
    try:
        found = config_beside(given)
    except UserError as e:
        raise UserError(f"{given!r} is no YAML file, such as configs/recall_tiny.yaml, and no adapter: {e}") from e
    if found is None:
        raise UserError(
            f"the adapter {given!r} lies there without a {FILE}, so nothing says its base, method and data; give the "
            f"config that it was trained with: CONFIG.yaml --adapter {given}"
        )
    return dataclasses.replace(found, adapter=dataclasses.replace(found.adapter, load=given))


def config_beside(adapter: str | Path) -> Config | None:
    """The config that an adapter was trained with, if it lies beside its files.

    Raises:
      UserError: if the adapter is not there, the config is damaged, or it comes from elsewhere and names code.
    """
    path = locate_adapter(adapter) / FILE
    if not path.is_file():
        return None
    tree = read_yaml(path)
    # A folder here is the user's own; one from a hub or bucket is somebody else's.
    if not Path(adapter).expanduser().is_dir() and (code := _code(tree)):
        raise UserError(
            f"the config of {adapter} names code, {code}, which does not come with an adapter and is not run for one "
            "from elsewhere; read it, install what it names, and give a config of your own: CONFIG.yaml --adapter "
            f"{adapter}"
        )
    return from_mapping(tree)


def _code(tree: Mapping[str, Any]) -> str:
    """The first function in a module that a config names for its method or data, if it names one."""
    method, data = (x if isinstance(x, Mapping) else {} for x in (tree.get("method"), tree.get("data")))
    values = [x for value in data.values() for x in (value if isinstance(value, list) else [value])]
    found = [x for x in values if isinstance(x, str) and x.startswith(OWN)]
    name = method.get("name")
    return name if isinstance(name, str) and named.is_named(name) else next(iter(found), "")


def portable(config: Config) -> Config:
    """A run's config as it goes with its adapter: without what holds for the run's machine and its start alone."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, precision="auto"),
        adapter=dataclasses.replace(config.adapter, load="", accept_other_method=False),
        train=dataclasses.replace(config.train, wandb=""),
        mesh=MeshConfig(),
    )


def chosen(config: Config) -> dict[str, Any]:
    """What a config says beyond the defaults, as nested dicts: `from_mapping` makes the same config of it."""
    # The defaults of the format that the data have; but ``format`` itself is said unless it is that of all defaults.
    usual = to_mapping(Config(data=type(config.data)()))
    return _beyond(to_mapping(config), {**usual, "data": {**usual["data"], "format": Config().data.format}})


def _beyond(ours: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: _beyond(value, usual[name]) for name, value in ours.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in ours.items() if name not in nested and value != usual.get(name)}
    return {name: both[name] for both in ({**nested, **plain},) for name in ours if both.get(name, {}) != {}}
