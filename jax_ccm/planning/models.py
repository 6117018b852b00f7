"""Which decoder is planned: shapes without weights."""

from __future__ import annotations

from pathlib import Path

from jax_ccm.config.loading import base_source, scratch_model
from jax_ccm.config.schema import Config
from jax_ccm.nn import ModelConfig

SHAPES = Path(__file__).parent / "shapes"


def model_shape(config: Config, given: str = "") -> tuple[str, ModelConfig]:
    """Name and sizes of the model: of ``given``, of a shipped shape of the same name, or of the config's source.

    Raises:
      UserError: if there is no such shape.
    """
    from jax_ccm.weights import read_config

    if not given and not config.model.source:
        return "from scratch", scratch_model(config.model.scratch)
    source = given or base_source(config)
    known = SHAPES / source.rsplit("/", 1)[-1]
    return source, read_config(known if known.is_dir() else source, config.model.rope_length)
