"""Shapes of LLaMA and its relatives: configuration, presets and parameter counts."""

import dataclasses
from typing import NamedTuple

from examples.llama.run.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of rotary embeddings to contexts longer than the original one.

    Frequencies with fewer than `low_freq_factor` turns in the original context are
    divided by `factor`. Those with more than `high_freq_factor` turns are kept, and
    those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


class Family(NamedTuple):
    """The parts that a family of models adds to the layers of LLaMA."""

    architecture: str
    """The class in Transformers that computes it."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalised before it is rotated."""


# The keys are Transformers' names of the families, `model_type` in a config.json.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "mistral": Family("MistralForCausalLM"),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA, Qwen2 (and 2.5), Qwen3 or Mistral.

    A Qwen2 has biases on queries, keys and values. A Qwen3 has an RMS norm on each head
    of queries and keys. The others have neither, and no model has any other bias.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    num_kv_heads: int = 0
    """Heads of keys and values, each shared by as many query heads; 0 means
    `num_heads`."""
    head_size: int = 0
    """0 means `hidden_size / num_heads`."""
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tied_head: bool = False
    """Whether the output head is the embedding, transposed."""
    model_type: str = "llama"
    """A key of `FAMILIES`. An export writes it to config.json."""
    sliding_window: int | None = None
    """The tokens that a position attends to, itself included; None means all before it.
    Attention is computed without a window, so sequences must not be longer than it."""
    lora_rank: int = 0
    """The rank of the LoRA adapters beside the layers' kernels; 0 means none."""
    lora_alpha: float = 0.0
    """The adapters' output is multiplied by `lora_alpha / lora_rank`."""

    @property
    def base(self) -> "LlamaConfig":
        """The shape without adapters."""
        return dataclasses.replace(self, lora_rank=0, lora_alpha=0.0)

    @property
    def lora_scale(self) -> float:
        """The factor of the adapters' output."""
        return self.lora_alpha / self.lora_rank

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.model_type].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.model_type].qk_norm

    @property
    def longest_seq(self) -> int:
        """The longest sequence, in tokens, that the model is computed for."""
        return min(self.max_seq_len, self.sliding_window or self.max_seq_len)

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is unknown; choose one of: "
                f"{', '.join(FAMILIES)}"
            )
        if not self.head_size and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads "
                f"{self.num_heads}, unless head_size is given"
            )
        # The class is frozen, because `jax.jit` hashes the graph definition that has
        # it. Only here are the two defaults resolved.
        object.__setattr__(
            self, "head_size", self.head_size or self.hidden_size // self.num_heads
        )
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        if self.head_size % 2:
            raise ValueError(
                f"head_size {self.head_size} must be even for rotary embeddings"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )


# 60m to 7b are the shapes of the GaLore and APOLLO papers, and 13b is LLaMA-13B. The
# others are the published models of their names: mistral-7b is version 0.3, and
# qwen2.5-7b has the context of the base model. `tiny` and `6m` are for CPUs: three
# optimizers train `tiny` for a few hundred steps in a few minutes on two cores.
PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(2048, 128, 344, 4, 4),
    "6m": LlamaConfig(2048, 256, 688, 4, 6),
    "60m": LlamaConfig(32000, 512, 1376, 8, 8),
    "130m": LlamaConfig(32000, 768, 2048, 12, 12),
    "350m": LlamaConfig(32000, 1024, 2736, 16, 24),
    "1b": LlamaConfig(32000, 2048, 5461, 32, 24),
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32),
    "13b": LlamaConfig(32000, 5120, 13824, 40, 40),
    "llama-2-70b": LlamaConfig(
        32000, 8192, 28672, 64, 80, num_kv_heads=8, max_seq_len=4096, rms_norm_eps=1e-5
    ),
    "llama-3.2-1b": LlamaConfig(
        128_256,
        2048,
        8192,
        32,
        16,
        num_kv_heads=8,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        rms_norm_eps=1e-5,
        tied_head=True,
    ),
    "llama-3-8b": LlamaConfig(
        128_256,
        4096,
        14336,
        32,
        32,
        num_kv_heads=8,
        max_seq_len=8192,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
    ),
    "llama-3.1-8b": LlamaConfig(
        128_256,
        4096,
        14336,
        32,
        32,
        num_kv_heads=8,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        rms_norm_eps=1e-5,
    ),
    "qwen2.5-7b": LlamaConfig(
        152_064,
        3584,
        18944,
        28,
        28,
        num_kv_heads=4,
        max_seq_len=131_072,
        rope_theta=1_000_000.0,
        model_type="qwen2",
    ),
    "qwen3-8b": LlamaConfig(
        151_936,
        4096,
        12288,
        32,
        36,
        num_kv_heads=8,
        head_size=128,
        max_seq_len=40_960,
        rope_theta=1_000_000.0,
        model_type="qwen3",
    ),
    "mistral-7b": LlamaConfig(
        32_768,
        4096,
        14336,
        32,
        32,
        num_kv_heads=8,
        max_seq_len=32_768,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-5,
        model_type="mistral",
    ),
}


def preset(name: str) -> LlamaConfig:
    """Returns the preset called `name`; raises `UsageError` if there is none."""
    if name not in PRESETS:
        raise unknown_name("`model`", name, PRESETS)
    return PRESETS[name]


def matmul_param_count(config: LlamaConfig) -> int:
    """Returns the number of parameters in the layers' kernels and the head.

    Each token is multiplied with these.
    """
    D, F = config.hidden_size, config.intermediate_size
    attention = 2 * D * config.head_size * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * D * F) + config.vocab_size * D


def param_count(config: LlamaConfig) -> int:
    """Returns the number of the model's own parameters; a tied head is counted once."""
    D, H = config.hidden_size, config.head_size
    embedding = 0 if config.tied_head else config.vocab_size * D
    vectors = 2 * D
    if config.qkv_bias:
        vectors += (config.num_heads + 2 * config.num_kv_heads) * H
    if config.qk_norm:
        vectors += 2 * H
    return matmul_param_count(config) + embedding + config.num_layers * vectors + D


def adapter_count(config: LlamaConfig) -> int:
    """Returns the number of parameters in the LoRA adapters."""
    D, H = config.hidden_size, config.head_size
    attention = 4 * D + 2 * H * (config.num_heads + config.num_kv_heads)
    sides = attention + 3 * (D + config.intermediate_size)
    return config.num_layers * config.lora_rank * sides
