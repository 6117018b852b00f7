"""The shape of a base model. Read from files by `jax_ccm.weights`; consumed by `jax_ccm.nn`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of RoPE frequencies.

    Attributes:
      kind: "linear" divides all frequencies by `factor`; "llama3" only low ones (Llama 3.1).
      factor: how much longer the context becomes.
      low_freq_factor, high_freq_factor, original_max_position: the band edges of "llama3".
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-like decoder.

    Attributes:
      family: Hugging Face `model_type` ("llama", "mistral", "qwen2", "qwen3"), kept for fingerprints and export.
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes.
      norm_eps: RMSNorm epsilon.
      rope_theta, rope_scaling: rotary embedding.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      qk_norm: RMSNorm over each head of queries and keys (Qwen3).
      sliding_window: raw text farther back is not attended, or None.
      max_position: positions the model was trained for; beyond is allowed, and warned about.
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

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads; "
                "the first must be a multiple of the second"
            )

    def kv_bytes_per_slot(self, itemsize: int) -> int:
        """Bytes of one cache slot over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside a frozen base model.

    Attributes:
      rank: LoRA rank; 0 for no LoRA.
      alpha: the LoRA branch is scaled by ``alpha / rank``.
      dropout: on the input of the LoRA branch, in training only.
      targets: projections with a LoRA, of "q_proj", "k_proj", "v_proj", "o_proj".
      tokens: rows of the table of compression-token embeddings.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    tokens: int = 0

    def __post_init__(self):
        allowed = ("q_proj", "k_proj", "v_proj", "o_proj")
        for target in self.targets:
            if target not in allowed:
                raise ValueError(f"adapter target {target!r} is not one of {', '.join(allowed)}")
        if self.rank < 0 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter rank {self.rank} must be >= 0 and dropout {self.dropout} in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0
