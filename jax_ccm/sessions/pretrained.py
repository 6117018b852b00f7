"""An adapter and all that it works on, by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_ccm.config.adapters import open_config
from jax_ccm.config.loading import TRAINED_BASE, Experiment, load_experiment
from jax_ccm.config.schema import check
from jax_ccm.config.sections import MeshConfig
from jax_ccm.config.yaml import convert
from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.weights.adapters import Adapter


class Pretrained(Experiment):
    """An experiment that can talk."""

    def conversations(self, rows: int = 1, **options: Any) -> Conversations:
        """Empty sessions, side by side on one cache. Arguments and errors as `Conversations`."""
        return Conversations(self, rows, **options)


def from_pretrained(
    name: str | Path,
    *,
    base: str | Path | None = None,
    precision: str = "auto",
    mesh: Mapping[str, int] | None = None,
) -> Pretrained:
    """An adapter with its base, method, tokenizer and template: an adapter knows what it belongs to.

    Args:
      name: of an adapter that comes with the library, its folder, or a hub id, ``ORG/NAME`` or ``ORG/NAME@REVISION``.
      base: where its base is, if not where its config says: a local folder, a hub id, a ``.gguf`` file, or
        ``package:NAME/FILE.gguf``. Its weights must be those that the adapter was trained on.
      precision: types of the base's weights, of products and of activations (`model.precision`).
      mesh: how many devices share the work in which way, such as ``{"fsdp": 8}``; None for copies of the model.

    Returns:
      ``model``, ``method``, ``tokenizer``, ``template``, ``mesh`` (use the model within ``sharding.use(mesh)`` where it
      has several devices), the ``config`` that it was trained with, and live sessions (`Pretrained.conversations`).

    Raises:
      UserError: for a name that is not there (with those that are), an adapter that lies there without its config, a
        base that is not to be had or is another one, a precision or mesh that cannot be.
    """
    config = open_config(str(name))
    model = dataclasses.replace(config.model, precision=precision)
    if base is not None:
        if TRAINED_BASE in Adapter.read(name).extra:
            raise UserError(f"{name} was trained together with its base, which lies beside it; leave out base={base!r}")
        model = dataclasses.replace(model, source=str(base), revision="")
    sizes = convert(MeshConfig, dict(mesh or {}), "mesh")
    config = dataclasses.replace(config, model=model, mesh=sizes)
    check(config)
    found = load_experiment(config)
    return Pretrained(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})
