"""Values of a config that no run could use, refused before anything is opened."""

from __future__ import annotations

from typing import Any

from jax_ccm.data.config import TextConfig
from jax_ccm.errors import UserError
from jax_ccm.numerics import Precision


def check(config: Any) -> None:
    """Refuses values that no run could use.

    Args:
      config: a `schema.Config`, which itself is checked when it is read.

    Raises:
      UserError: naming the key, its value and what is allowed.
    """
    at_least = {
        "adapter.rank": 0, "optimizer.accumulation": 1, "optimizer.clip_norm": 0, "optimizer.weight_decay": 0,
        "train.steps": 1, "train.log_every": 1, "train.eval_every": 0, "train.eval_examples": 1,
        "train.checkpoint_every": 1, "train.keep": 1, "train.grace": 0, "train.heartbeat": 1, "train.seed": 0,
        "eval.batch_size": 1, "eval.window": 1, "eval.max_examples": 0, "eval.reply_tokens": 0,
        "cache.memory_capacity": 1, "cache.raw_capacity": 1,
    }  # fmt: skip
    for path, least in at_least.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        # Not ``value < least``: NaN is refused, too. So below.
        if not value >= least:
            raise UserError(f"{path} is {value}; it must be at least {least}")
    if config.eval.reply_tokens and config.data.format in ("text", "recall"):
        raise UserError(
            f"eval.reply_tokens is {config.eval.reply_tokens}, and data.format {config.data.format!r} asks nothing "
            "that a reply could answer; set it to 0, or evaluate dialogues, online or few-shot records"
        )
    if config.eval.by == "stream" and not (isinstance(config.data, TextConfig) and config.data.ratio is None):
        raise UserError(
            "eval.by 'stream' reads plain text: it needs data.format 'text' without data.ratio, not "
            f"{config.data.format!r}"
        )
    if not config.optimizer.learning_rate > 0:
        raise UserError(f"optimizer.learning_rate is {config.optimizer.learning_rate}; it must be above 0")
    if not 0 <= config.optimizer.warmup_ratio < 1:
        raise UserError(f"optimizer.warmup_ratio is {config.optimizer.warmup_ratio}; it must lie in [0, 1)")
    if not 0 <= config.adapter.dropout < 1:
        raise UserError(f"adapter.dropout is {config.adapter.dropout}; it must lie in [0, 1)")
    precision = config.model.precision
    if precision != "auto" and Precision.of(precision).params != "float32" and config.train.trainable == "all":
        raise UserError(
            f"train.trainable is 'all' with model.precision {precision!r}: small updates would be lost in rounding. "
            "Use float32, auto or params=float32,compute=bfloat16,output=float32, or train the adapter (always float32)"
        )
    if config.data.buckets and config.optimizer.accumulation > 1:
        raise UserError(
            f"optimizer.accumulation={config.optimizer.accumulation} needs micro-batches of one shape, and "
            "data.buckets gives several; use a larger data.batch_size, or leave data.buckets empty"
        )
    if config.model.rope_length is not None and not config.model.source:
        raise UserError("model.rope_length is given, but a model from scratch has no scaled rope; leave it out")
    if config.model.revision and (not config.model.source or "@" in config.model.source):
        raise UserError(
            f"model.revision is {config.model.revision!r}, and model.source {config.model.source!r}; a revision is "
            "that of a source on the hub, and is given once"
        )
    if config.adapter.merge and not config.model.source:
        raise UserError("adapter.merge needs a pretrained base (model.source); a model from scratch has no first stage")
