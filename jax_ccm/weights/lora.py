"""What an adapter is, apart from files and models: arrays by path, and where they belong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.methods.stored import described
from jax_ccm.nn import AdapterConfig
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.records.parsing import fits

COMP = "embed_tokens.comp"


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """A trained adapter and what is known of where it belongs.

    Attributes:
      config: its shape and scale.
      arrays: float32, by parameter path: "layers.self_attn.q_proj.lora_a" ``[L, in, r]``, "….lora_b" ``[L, r, out]``,
        "embed_tokens.comp" ``[n, D]``.
      method: description of the method it was trained for (`identity.describe_method`), or None if unknown.
      base: description of its base model (`identity.describe_base`), or None if unknown.
      extra: anything else that was saved with it, such as the training step.
      partial: its LoRA is on some layers only; layers behind the last of its arrays have none.
      source: where it was read from, for messages.
    """

    config: AdapterConfig
    arrays: dict[str, np.ndarray]
    method: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial: bool = False
    source: str = "the adapter"

    def __post_init__(self):
        expected = names(self.config)
        where = self.source
        missing = [name for name in expected if name not in self.arrays]
        if missing:
            raise UserError(f"{where} lacks tensor {missing[0]!r}, one of {len(expected)} it should have; get it again")
        odd = [name for name in self.arrays if name not in expected]
        if odd:
            raise UserError(f"{where} holds tensor {odd[0]!r}, which its own description does not name")
        rank, rows = self.config.rank, self.config.tokens
        layers = {x.shape[0] for name, x in self.arrays.items() if name != COMP and x.ndim == 3}
        for name, x in self.arrays.items():
            axis, size = {"lora_a": (2, rank), "lora_b": (1, rank), "comp": (0, rows)}[name.rsplit(".", 1)[1]]
            if x.ndim != (2 if name == COMP else 3) or x.shape[axis] != size or len(layers) > 1:
                raise UserError(
                    f"{where}: tensor {name!r} is {list(x.shape)}; expected are [layers, in, {rank}] for lora_a, "
                    f"[layers, {rank}, out] for lora_b, [{rows}, width] for {COMP}, and as many layers in all"
                )
            if not np.isfinite(x).all():
                raise UserError(f"{where}: tensor {name!r} holds NaN or infinite numbers, from a run that failed")

    def with_targets(self, config: AdapterConfig, fresh: Mapping[str, Any]) -> Self:
        """With another config that names further projections.

        Args:
          config: of the same rank, with all targets of this one.
          fresh: arrays of the further projections, by path.
        """
        return dataclasses.replace(self, config=config, arrays={**self.arrays, **fresh})


# What is read of a base model's description (`identity.describe_base`), and of what is kept with an adapter.
_BASE: dict[str, Any] = {
    "name": (str, None), "fingerprint": str, "config": lambda value: _holds(value, {"rope_scaling": (dict, None)}),
    "sample": lambda value: fits(value, dict) and all(map(_is_sample, value.values())),
}  # fmt: skip
_COUNTS = dict.fromkeys(("steps", "tokens", "scored_tokens", "seconds"), (int, float))
_RUN = {**_COUNTS, "seed": int, "precision": str, "hardware": str, "versions": dict}
_EXTRA: dict[str, Any] = {"runs": [_RUN], "trained_base": str}


def belonging(about: Any, where: str) -> dict[str, Any]:
    """What a file says of where its adapter belongs: its method, base and extra, under the names of `Lora`.

    Args:
      about: JSON values of the file.
      where: the file, for messages.

    Raises:
      UserError: if they are not of the form that this library writes.
    """
    if not fits(about, {"method": (dict, None), "base": (dict, None), "extra": dict}):
        raise UserError(f"{where} is damaged: it does not say which method and base it belongs to; get it again")
    for name, form in (("base", _BASE), ("extra", _EXTRA)):
        value = about[name]
        if value is not None and not _holds(value, form):
            bad = next(key for key in form if key in value and not fits(value[key], form[key]))
            raise UserError(f"{where} is damaged: its {name} has {bad} {str(value[bad])[:60]!r}; get it again")
    method = None if about["method"] is None else described(about["method"], where)
    return {"method": method, "base": about["base"], "extra": about["extra"]}


def _holds(value: Any, form: dict[str, Any]) -> bool:
    """Whether it is an object whose values have these forms, as far as they are there: older files lack some."""
    return fits(value, dict) and all(fits(value[name], own) for name, own in form.items() if name in value)


def _is_sample(value: Any) -> bool:
    """Whether it is numbers of 16 bits in hexadecimal digits."""
    return fits(value, str) and re.fullmatch("(?:[0-9a-f]{4})+", value) is not None


def names(config: AdapterConfig) -> list[str]:
    """Parameter paths of an adapter of this shape."""
    lora = [f"{stem(target)}.{leaf}" for target in config.targets for leaf in ("lora_a", "lora_b")]
    return (lora if config.rank else []) + ([COMP] if config.tokens else [])


def stem(target: str) -> str:
    """The path of a projection's arrays, such as "layers.mlp.up_proj"."""
    return f"layers.{PROJECTIONS[target]}.{target}"


def depth(arrays: dict[str, np.ndarray]) -> int:
    """Layers of an adapter's arrays; 0 without a LoRA."""
    return max((x.shape[0] for path, x in arrays.items() if path != COMP), default=0)
