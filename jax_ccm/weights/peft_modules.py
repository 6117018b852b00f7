"""Which modules of a model a PEFT config gives a LoRA, and of which rank and scale."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.nn.config import PROJECTIONS

# Ours. PEFT passes an unknown field over with a warning that shows its name, which therefore says it all.
NOTE = "jax_ccm__this_LoRA_acts_on_compression_tokens_only__PEFT_would_run_it_on_all_tokens"

# Fields of a PEFT config that do not change the computation of a finished adapter, whatever they hold.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "loftq_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", NOTE,
}  # fmt: skip
# Fields that are read below.
_READ = {
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "r",
    "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# Fields that do: the values with which they do nothing. Any other field must be empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "task_type": ("CAUSAL_LM", None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
_REASONS = {
    "alora_invocation_tokens": "a LoRA that starts at some token",
    "bias": "trained biases",
    "fan_in_fan_out": "kernels stored the other way round",
    "init_lora_weights": "an initialisation that also changes the base weights, so that the adapter fits no other base",
    "layer_replication": "repeated layers",
    "lora_bias": "a bias in the LoRA",
    "modules_to_save": "whole modules that were trained besides the LoRA",
    "target_parameters": "a LoRA on bare parameters",
    "task_type": "a head other than the language model's",
    "trainable_token_indices": "trained rows of the vocabulary",
    "use_dora": "DoRA, which also rescales the weights",
}


@dataclasses.dataclass(frozen=True)
class Modules:
    """The modules of a PEFT config, by their names in the base model ("model.layers.0.mlp.up_proj").

    Attributes:
      rank, alpha, dropout: of the LoRA, where no pattern says otherwise.
      targets: names, or ends of names, of the modules; or one regular expression, or "all-linear".
      excluded: in the same form, of modules that are left out nonetheless.
      layers: numbers of the layers; None for all.
      layers_names: what stands before such a number ("layers"); () for anything.
      ranks, alphas: of modules whose name ends in a match of a pattern; the first pattern counts.
      by_root: the scale is alpha / sqrt(rank), not alpha / rank (rsLoRA).
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layers_names: tuple[str, ...] = ()
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    by_root: bool = False

    def has(self, name: str) -> bool:
        """Whether a module has a LoRA."""
        if _matches(self.excluded, name):
            return False
        if self.targets == "all-linear":
            return name.split(".")[-1] in PROJECTIONS
        if not _matches(self.targets, name):
            return False
        # Layers are chosen among modules that are named by their end.
        return self.layers is None or name in self.targets or self._layer(name) in self.layers

    def _layer(self, name: str) -> int | None:
        # As in PEFT: without names anything may stand before the number.
        before = "|".join(self.layers_names) or r"[^.]*"
        found = re.match(rf"(?:.*?\.)?(?:{before})\.(\d+)\.", name)
        return int(found[1]) if found else None

    def rank_of(self, name: str) -> int:
        """The rank of a module."""
        return _first(self.ranks, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of a module."""
        return _first(self.alphas, name, self.alpha)

    def scale_of(self, name: str) -> float:
        """What the product of a module's two matrices is multiplied by."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (rank**0.5 if self.by_root else rank)

    def strangers(self) -> list[str]:
        """Names that are asked for and are no projection of a layer, such as the head."""
        names = () if isinstance(self.targets, str) else self.targets

        def known(name):
            return name.split(".")[-1] in PROJECTIONS or _matches(self.excluded, name)

        return [name for name in names if not known(name)]


def read_modules(config: dict[str, Any], path: Path) -> Modules:
    """Reads PEFT's config of a LoRA.

    Raises:
      UserError: naming the field, if it asks for something that is not implemented, or holds what it cannot.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA is implemented")
    for field, value in config.items():
        neutral = value in _NEUTRAL[field] if field in _NEUTRAL else not value
        if field not in _HARMLESS | _READ and not neutral:
            reason = f" ({_REASONS[field]})" if field in _REASONS else ""
            raise UserError(f"{path}: {field} is {value!r}{reason}, which is not implemented; refused")
    given = _Given(config, path)
    targets, layers = given.names("target_modules", 1), given.layers()
    if layers is not None and isinstance(targets, str) and targets != "all-linear":
        raise given.refused("layers_to_transform", "empty where target_modules is a regular expression")
    made = Modules(
        rank=given.rank(),
        alpha=given.number("lora_alpha"),
        dropout=given.dropout(),
        targets=targets,
        excluded=given.names("exclude_modules", 0),
        layers=layers,
        layers_names=given.layers_names(),
        ranks=given.patterns("rank_pattern", (int,), 1, "an integer from 1"),
        alphas=given.patterns("alpha_pattern", (int, float), 0, "a number"),
        by_root=bool(config.get("use_rslora")),
    )
    if made.strangers():
        raise UserError(
            f"{path}: target_modules names {', '.join(map(repr, made.strangers()))}; implemented is a LoRA on "
            f"{', '.join(PROJECTIONS)}"
        )
    return made


class _Given:
    """The fields of a config, each checked as it is taken."""

    def __init__(self, config: dict[str, Any], path: Path):
        self._config, self._path = config, path

    def refused(self, field: str, need: str) -> UserError:
        return UserError(f"{self._path}: {field} is {self._config.get(field)!r}; it must be {need}")

    def rank(self) -> int:
        rank = self._config.get("r")
        # Not isinstance, to which true is an integer.
        if type(rank) is not int or rank < 1:
            raise self.refused("r", "an integer from 1")
        return rank

    def number(self, field: str, default: float | None = None) -> float:
        value = self._config.get(field, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.refused(field, "a number, not negative")
        return float(value)

    def dropout(self) -> float:
        dropout = self.number("lora_dropout", 0.0)
        if dropout >= 1:
            raise self.refused("lora_dropout", "below 1")
        return dropout

    def layers(self) -> tuple[int, ...] | None:
        layers = self._config.get("layers_to_transform")
        layers = [layers] if type(layers) is int else layers or None
        if layers is None:
            return None
        if not (isinstance(layers, list) and all(type(x) is int and x >= 0 for x in layers)):
            raise self.refused("layers_to_transform", "a number of a layer, or a list of them")
        return tuple(layers)

    def layers_names(self) -> tuple[str, ...]:
        before = self._config.get("layers_pattern") or ()
        before = (before,) if isinstance(before, str) else before
        if not isinstance(before, Sequence) or not _compiles(before):
            raise self.refused("layers_pattern", "a name, or a list of names")
        return tuple(before)

    def names(self, field: str, least: int) -> tuple[str, ...] | str:
        given = self._config.get(field)
        if isinstance(given, str) and given and _compiles([given]):
            return given
        listed = given if isinstance(given, list) else [] if given is None or given == "" else None
        if listed is None or len(listed) < least or not all(isinstance(name, str) for name in listed):
            raise self.refused(field, "a list of names of modules, or one regular expression")
        return tuple(listed)

    def patterns(self, field: str, kinds: tuple[type, ...], least: int, need: str) -> dict[str, Any]:
        given = self._config.get(field) or {}
        good = isinstance(given, dict) and _compiles(given)
        if not good or any(type(x) not in kinds or x < least for x in given.values()):
            raise self.refused(field, f"an object with {need} for each pattern of names")
        return given


def _matches(wanted: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(wanted, str):
        # As in PEFT: a string is a regular expression for the whole name, a list has names or their ends.
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _first(patterns: dict[str, Any], name: str, otherwise: Any) -> Any:
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, otherwise)


def _compiles(patterns: Iterable[Any]) -> bool:
    try:
        return all(re.compile(pattern) for pattern in patterns)
    except (re.error, TypeError):
        return False
