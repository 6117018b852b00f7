"""The shape of a base model. Read from files by `jax_ccm.weights`; consumed by `jax_ccm.nn`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of RoPE frequencies.

    Attributes:
      kind: "linear" divides all frequencies by `factor`; "llama3" only low ones (Llama 3.1); "yarn" low ones, by bands
        of turns (Peng et al. 2023); "dynamic" raises the base for text beyond `original_max_position` (dynamic NTK);
        "longrope" divides each frequency by a factor of its own (Ding et al. 2024).
      factor: how much longer the context becomes.
      low_freq_factor, high_freq_factor: the band edges of "llama3".
      original_max_position: positions before scaling.
      attention_factor: cosine and sine are multiplied by it.
      beta_fast, beta_slow, truncate: the band edges of "yarn" in turns, and whether they are whole dimensions.
      short_factor, long_factor: of "longrope", one for each pair: up to `original_max_position`, and beyond.
      length: positions that sessions will reach, for "dynamic" and "longrope"; None for no more than they have without
        it. It cannot follow a session: keys that are in a cache keep the frequencies that they were rotated by.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    length: int | None = None

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on `length`."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-like decoder.

    Attributes:
      family: Hugging Face `model_type` ("llama", "qwen2", "phi3", ...), kept for fingerprints and export.
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes.
      norm_eps: RMSNorm epsilon.
      rope_theta, rope_scaling: rotary embedding.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      qk_norm: RMSNorm over each head of queries and keys (Qwen3).
      sliding_window: raw text farther back is not attended, or None.
      max_position: positions the model was trained for; beyond is allowed, and warned about.
      rotary_factor: the share of each head, from its beginning, that is rotated (Phi-4-mini).
      full_layers: layers that see all raw text in spite of `sliding_window` (Gemma).
      activation: of the MLP's gate.
      post_norms: norms of the outputs of attention and MLP, too, before they are added (Gemma).
      norm_offset: norms multiply by ``1 + weight`` (Gemma).
      scale_embeddings: embeddings are multiplied by the square root of `hidden_size` (Gemma).
      query_scalar: scores are divided by its square root; None for `head_dim`.
      score_cap, logit_cap: if set, c of ``c tanh(x / c)``, for attention scores and for logits (Gemma 2).
      window_theta: rotary base of the layers that have the window, without scaling (Gemma 3); None for that of all.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position: int = 2048
    rotary_factor: float = 1.0
    full_layers: tuple[int, ...] = ()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    post_norms: bool = False
    norm_offset: bool = False
    scale_embeddings: bool = False
    query_scalar: int | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    window_theta: float | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads; "
                "the first must be a multiple of the second"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"{self.rotary_dim} numbers of a head are rotated; rotary embedding needs an even number")

    def kv_bytes_per_slot(self, itemsize: int) -> int:
        """Bytes of one cache slot over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @property
    def layer_weights(self) -> int:
        """Numbers in the projections of all layers: each costs two FLOPs a token."""
        # Queries and output have N heads each, keys and values K each; the MLP has three matrices.
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    def forward_flops(self, tokens: int, pairs: int, scored: int) -> float:
        """FLOPs of a forward pass, a multiplication and an addition being two.

        Args:
          tokens: that pass through the layers.
          pairs: of a query and a key, in each layer.
          scored: tokens whose logits are computed.
        """
        # Two products for a pair, with its key and with its value: four FLOPs for each number of a head.
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * pairs
        return 2.0 * self.layer_weights * tokens + attention + 2.0 * self.vocab_size * self.hidden_size * scored

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Of each layer, whether it has the sliding window."""
        return tuple(
            self.sliding_window is not None and number not in self.full_layers for number in range(self.num_layers)
        )

    def as_seen(self, windowed: bool) -> ModelConfig:
        """The config as a layer with or without the window sees it."""
        if not windowed:
            return dataclasses.replace(self, sliding_window=None)
        if self.window_theta is None:
            return self
        return dataclasses.replace(self, rope_theta=self.window_theta, rope_scaling=None)

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return int(self.head_dim * self.rotary_factor)

    @property
    def positions(self) -> int:
        """Positions that the rotary embedding serves; beyond is allowed, and warned about."""
        scaling = self.rope_scaling
        length = (scaling.length if scaling is not None else None) or 0
        # With the short factors, which hold for lengths up to the original one, it serves no more than that.
        if scaling is not None and scaling.kind == "longrope" and length <= scaling.original_max_position:
            return min(self.max_position, scaling.original_max_position)
        return max(self.max_position, length)

    def for_length(self, length: int | None) -> ModelConfig:
        """The config with RoPE for sessions that reach so many positions (`RopeScaling.length`).

        Raises:
          ValueError: if this model's RoPE does not depend on a length.
        """
        if length is None:
            return self
        scaling = self.rope_scaling
        if scaling is None or not scaling.by_length:
            kind = "has no scaling" if scaling is None else f"is scaled by {scaling.kind!r}"
            raise ValueError(f"the rope of this model {kind} and does not depend on a length; leave it out")
        if length < 1:
            raise ValueError(f"a session of {length} positions has no text; give the most positions that one reaches")
        return dataclasses.replace(self, rope_scaling=dataclasses.replace(scaling, length=length))


# Projections that may have a LoRA, and the part of a layer that each belongs to.
PROJECTIONS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside a frozen base model.

    Attributes:
      rank: LoRA rank; 0 for no LoRA.
      alpha: the LoRA branch is scaled by ``alpha / rank``.
      dropout: on the input of the LoRA branch, in training only.
      targets: projections with a LoRA, of `PROJECTIONS`.
      tokens: rows of the table of compression-token embeddings.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    tokens: int = 0

    def __post_init__(self):
        for target in self.targets:
            if target not in PROJECTIONS:
                raise ValueError(f"adapter target {target!r} is not one of {', '.join(PROJECTIONS)}")
        if self.rank < 0 or self.tokens < 0 or not 0.0 <= self.dropout < 1.0 or not math.isfinite(self.alpha):
            raise ValueError(
                f"adapter rank {self.rank} and tokens {self.tokens} must be >= 0, dropout {self.dropout} in [0, 1), "
                f"and alpha {self.alpha} a number"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0
