"""From a config to the objects that every command works with: model, method, tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jax_ccm import methods
from jax_ccm.config.schema import Config
from jax_ccm.config.sections import ScratchConfig
from jax_ccm.data.config import TurnsConfig
from jax_ccm.data.documents import FORMATS
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import UserError
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer, abstract_transformer
from jax_ccm.numerics import resolved
from jax_ccm.records import paths
from jax_ccm.rules.describe import completed, describe_method, label
from jax_ccm.rules.types import Method

if TYPE_CHECKING:
    from jax_ccm.data.template import Template
    from jax_ccm.weights.adapters import Adapter

# Where an adapter that was trained together with its base says where that base is, relative to its own folder.
TRAINED_BASE = "trained_base"


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """What a config describes.

    Attributes:
      config: the config.
      model: base and adapter.
      method: the compression method.
      tokenizer: a fast tokenizer of transformers, or None for generated data that has token ids already.
      mesh: the devices that the model is spread over; use the model within `sharding.use(mesh)`.
      source: what the base was loaded from; empty if it was made from scratch.
      loaded: the adapter that was read; None for a fresh one.
    """

    config: Config
    model: Transformer
    method: Method
    tokenizer: Any
    mesh: jax.sharding.Mesh
    source: str = ""
    loaded: Adapter | None = None

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the base."""
        return self.model.config

    @property
    def adapter_config(self) -> AdapterConfig:
        """The shape of the adapter."""
        assert self.model.adapter is not None
        return self.model.adapter

    @functools.cached_property
    def template(self) -> Template | None:
        """How sessions are put together from turns or contexts; None for data that have no such pieces."""
        from jax_ccm.data.template import Template

        return None if self.tokenizer is None else Template.of(self.config.data, self.tokenizer)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end a reply: the tokenizer's end of sequence, and all that the model's files name.

        Raises:
          UserError: if those files are damaged.
        """
        from jax_ccm.weights.endings import end_tokens

        source = base_source(self.config) or self.config.model.tokenizer
        found = set(end_tokens(source, self.model_config.vocab_size)) if source else set()
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return tuple(sorted(found | ({own} if own is not None else set())))

    @functools.cached_property
    def reply_ends(self) -> tuple[int, ...]:
        """`ends`, and the tokens with which a turn of the data ends: of a message, or those that hold a line break."""
        data, found = self.config.data, set(self.ends)
        if self.tokenizer is None or not isinstance(data, TurnsConfig):
            return self.ends
        if data.writes_messages:
            assert self.template is not None
            # The first token of a message's tail; what follows it is a line break or the like.
            found |= set(self.template.end[:1].tolist())
        elif "\n" in data.fixed_texts()["separator"]:
            # The separator begins the next turn with a line break, which may be within a token of several characters.
            texts = self.tokenizer.batch_decode([[i] for i in range(self.model_config.vocab_size)])
            found |= {i for i, text in enumerate(texts) if "\n" in text}
        return tuple(sorted(found))

    @property
    def base_name(self) -> str:
        """What to call the base model in files and messages."""
        name = base_source(self.config) or "from scratch"
        return f"{name} + {self.config.adapter.merge}" if self.config.adapter.merge else name


def base_source(config: Config) -> str:
    """Where the config's base comes from, with its revision; empty for one from scratch."""
    model = config.model
    return f"{model.source}@{model.revision}" if model.revision else model.source


def build_method(config: Config) -> Method:
    """The config's method.

    Raises:
      UserError: for an unknown name, or an option that it does not take or a value that it cannot have, or data that
        leave the method nothing to see.
    """
    try:
        method = methods.build(config.method.name, **config.method.options())
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"method: {e}") from e
    if method.heeds_marks and not method.remembers and not config.data.draws_spans:
        raise UserError(
            f"method {method.name!r} sees only text that the data keep, and these keep none; set data.ratio, and "
            "data.hide: tokens (data.format: text)"
        )
    return method


def with_precision(config: Config, platform: str | None = None) -> Config:
    """The config with ``model.precision: auto`` resolved, said in one line.

    Args:
      config: the config.
      platform: that the model is for; None for that of the devices here.
    """
    if config.model.precision != "auto":
        return config
    found, reason = resolved("auto", platform or jax.default_backend())
    if config.train.trainable == "all":
        found = dataclasses.replace(found, params="float32")  # small updates would be lost in rounding
    print(f"model.precision: {found} ({reason})")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, precision=str(found)))


def load_experiment(config: Config, *, adapter: str | Path | None = None) -> Experiment:
    """Loads everything that a config names.

    The base comes from ``model.source``, or is made from ``model.scratch`` and the seed; a stage-1 LoRA named by
    ``adapter.merge`` is folded into it. Beside it stands the adapter at ``adapter``, else the one that the config names
    (``adapter.load``), else a fresh one.

    Args:
      config: the config.
      adapter: folder, name or hub id of a trained adapter. Its own rank, alpha and targets hold, and if it was trained
        together with its base (``train.trainable: all``), that base is loaded.

    Raises:
      UserError: for anything that is missing, damaged or does not fit.
    """
    from jax_ccm.weights.adapters import Adapter
    from jax_ccm.weights.hf import parameters

    config = with_precision(config)
    method = build_method(config)
    shape = _adapter_config(config, method)
    # Three shapes: of what was read, of what must be made fresh beside it, and of the adapter in the end.
    stored, fresh = _stored(config, adapter, method), shape
    if stored is not None:
        # One that is named to the command holds as it is; one to start training from must be what the config says.
        if not adapter:
            _require_shape(stored.config, shape, config.adapter.load)
        targets = stored.config.targets
        # What the adapter to start from lacks is as in a fresh one, and changes nothing until it is trained.
        new = () if adapter else tuple(target for target in shape.targets if target not in targets)
        fresh = dataclasses.replace(shape, targets=new, tokens=0) if new else None
        shape = dataclasses.replace(stored.config, dropout=config.adapter.dropout, targets=(*targets, *new))
    source = base_source(config)
    # An adapter that was trained together with its base fits no other.
    if stored is not None and TRAINED_BASE in stored.extra:
        source = str(paths.of(f"{stored.source}/{stored.extra[TRAINED_BASE]}"))
    if stored is not None and source:
        _require_base(source, stored.source)
    tokenizer = tokenizer_of(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    # Only the fresh part of the adapter is made here; what was read is put in below.
    model = _base(config, source, fresh, tokenizer, mesh)
    on = {"base": base_source(config), "accept_quantised_base": config.adapter.accept_quantised_base}
    if config.adapter.merge:
        model = Adapter.read(config.adapter.merge).merged_into(model, **on)
    if config.model.source and config.data.tokens > model.config.positions:
        warnings.warn(
            f"rows of data.tokens={config.data.tokens} reach beyond the {model.config.positions} positions that "
            f"{config.model.source} was trained for{_longer(model.config)}",
            stacklevel=2,
        )
    if stored is not None:
        trained = stored.with_targets(shape, parameters(nnx.state(model, nnx.LoRAParam)))
        if fresh is not None:
            print(f"adapter.targets: {', '.join(fresh.targets)} start fresh; the others come from {stored.source}")
        shardings = _shardings(mesh, model.config, shape, config.model.precision)
        # Without the fresh part, whose arrays `with_targets` has taken over: `onto` compares the shapes of whole
        # adapters.
        model = trained.onto(model.with_adapter(None), method=method, shardings=shardings, **on)
    return Experiment(config, model, method, tokenizer, mesh, source, stored)


@contextlib.contextmanager
def open_experiment(config: Config, *, adapter: str | Path | None = None) -> Iterator[Experiment]:
    """The experiment of a command that runs in one process, within its mesh. Arguments as of `load_experiment`.

    Raises:
      UserError: as there, and if this process is one of several.
    """
    processes.refuse_several(devices=True)
    experiment = load_experiment(config, adapter=adapter)
    with sharding.use(experiment.mesh):
        yield experiment


def _require_base(source: str, adapter: str) -> None:
    """Refuses an adapter whose base is not to be had, before anything is loaded."""
    from jax_ccm.weights.sources import CONFIG_FILES, locate

    try:
        locate(source, CONFIG_FILES)
    except UserError as e:
        raise UserError(
            f"the base of the adapter {adapter} is not to be had: {e}. If you have it elsewhere, say where: "
            "--model.source PATH, or base=PATH of from_pretrained"
        ) from e


def _longer(shape: ModelConfig) -> str:
    """What to do about rows that are too long, if there is something."""
    scaling = shape.rope_scaling
    return "; set model.rope_length to the length" if scaling is not None and scaling.by_length else ""


def _adapter_config(config: Config, method: Method) -> AdapterConfig:
    given = config.adapter
    return AdapterConfig(given.rank, given.alpha, given.dropout, given.targets, tokens=method.num_embeddings)


def _stored(config: Config, adapter: str | Path | None, method: Method) -> Adapter | None:
    """The adapter that is named, for this method; None for a fresh one."""
    from jax_ccm.weights.adapters import Adapter

    source = adapter or config.adapter.load
    if not source:
        return None
    if adapter or not config.adapter.accept_other_method:
        return Adapter.read(source, method=method)
    found = Adapter.read(source)
    here = describe_method(method)
    if found.method is not None and here != completed(found.method):
        print(f"adapter.load: {found.source} was trained for {label(found.method)}; it starts {label(here)}")
    return found.trained_on(method)


def _require_shape(stored: AdapterConfig, wanted: AdapterConfig, path: str) -> None:
    """An adapter to continue from must be the one that the config describes, on the same projections or fewer."""
    for name in ("rank", "alpha", "targets"):
        have, want = getattr(stored, name), getattr(wanted, name)
        if name == "targets":
            have, want, fits = sorted(have), sorted(want), set(have) <= set(want)
        else:
            fits = have == want
        if not fits:
            more = " or to more of them" if name == "targets" else ""
            raise UserError(
                f"adapter.{name} is {want!r}, but the adapter to start from, {path}, has {have!r}; set the key to "
                f"that{more}"
            )


def tokenizer_of(config: Config) -> Any:
    """The tokenizer of the config's base; None for data that need none.

    Raises:
      UserError: if there is none.
    """
    if not FORMATS[config.data.format].tokenized:
        return None
    source = config.model.tokenizer or base_source(config)
    if source:
        from jax_ccm.weights import load_tokenizer

        return load_tokenizer(source)
    raise UserError(
        f"data.format {config.data.format!r} needs a tokenizer, and a model from scratch brings none; set "
        "model.tokenizer"
    )


def vocabulary(config: Config, tokenizer: Any) -> int:
    """V of the config's base, whose weights are not loaded.

    Args:
      config: the config.
      tokenizer: `tokenizer_of` it.
    """
    from jax_ccm.weights import read_config

    source = base_source(config)
    return (read_config(source) if source else scratch_model(config.model.scratch, tokenizer)).vocab_size


def _base(
    config: Config, source: str, adapter: AdapterConfig | None, tokenizer: Any, mesh: jax.sharding.Mesh
) -> Transformer:
    """The base with a fresh adapter of this shape if there is one, each array initialised where it belongs."""
    precision = config.model.precision
    key = jax.random.key(config.train.seed)
    if source:
        from jax_ccm.weights import load_model, read_config

        length = config.model.rope_length
        shardings = _shardings(mesh, read_config(source, length), adapter, precision)
        return load_model(
            source, adapter=adapter, precision=precision, key=key, shardings=shardings, rope_length=length
        )
    shape = scratch_model(config.model.scratch, tokenizer)
    shardings = _shardings(mesh, shape, adapter, precision)
    # Under jit with shardings each device makes its own part only.
    return jax.jit(lambda key: _scratch(key, shape, adapter, precision), out_shardings=shardings)(key)


def _shardings(mesh: jax.sharding.Mesh, shape: ModelConfig, adapter: AdapterConfig | None, precision: str) -> Any:
    """Where each array of the model goes.

    Raises:
      UserError: for a mesh that does not fit the model.
    """
    sharding.check(mesh, shape)
    return sharding.parameter_shardings(mesh, abstract_transformer(shape, adapter, precision), shape)


def _scratch(key, shape: ModelConfig, adapter: AdapterConfig | None, precision: str) -> Transformer:
    """A fresh model whose embeddings have standard deviation 0.3.

    The table of a `Transformer` is as small as a pretrained one's (0.02); the first layers' outputs would drown it. On
    the recall task 0.3 learned faster than 0.02 and than 1.
    """
    model = Transformer(key, shape, adapter, precision)
    graphdef, state = nnx.split(model)
    arrays = nnx.to_pure_dict(state)
    table = arrays["embed_tokens"]
    for name, number in (("embedding", 0), ("comp", 1)):
        if name in table:
            x = table[name]
            table[name] = 0.3 * jax.random.normal(jax.random.fold_in(key, number), x.shape, x.dtype)
    return nnx.merge(graphdef, arrays)


def scratch_model(scratch: ScratchConfig, tokenizer: Any = None) -> ModelConfig:
    """The shape of a model from scratch.

    Args:
      scratch: its sizes.
      tokenizer: whose vocabulary it has unless the sizes say another; None without one.

    Raises:
      UserError: for sizes that do not go together.
    """
    vocab = scratch.vocab_size or (0 if tokenizer is None else len(tokenizer))
    if not vocab:
        raise UserError(
            "model.scratch.vocab_size is 0 and there is no tokenizer to take it from; for generated recall data give "
            "1 + names + things"
        )
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=scratch.hidden,
        intermediate_size=scratch.intermediate,
        num_layers=scratch.layers,
        num_heads=scratch.heads,
        num_kv_heads=scratch.kv_heads,
        head_dim=scratch.hidden // scratch.heads,
        rope_theta=scratch.rope_theta,
    )
