"""LLaMA shapes: the configuration, the presets and their parameter counts."""

import dataclasses

from examples.llama.usage import unknown_name


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA model with untied embeddings and no biases."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads "
                f"{self.num_heads}: rotary embeddings need heads of equal, even size"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


# 60m to 7b are the shapes of the GaLore and APOLLO papers, 13b is LLaMA-13B. `tiny` is for CPUs:
# two optimizers train for a few hundred steps in a few minutes on two cores.
PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(2048, 128, 344, 4, 4),
    "60m": LlamaConfig(32000, 512, 1376, 8, 8),
    "130m": LlamaConfig(32000, 768, 2048, 12, 12),
    "350m": LlamaConfig(32000, 1024, 2736, 16, 24),
    "1b": LlamaConfig(32000, 2048, 5461, 32, 24),
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32),
    "13b": LlamaConfig(32000, 5120, 13824, 40, 40),
}


def preset(name: str) -> LlamaConfig:
    """Returns the preset called `name`; raises `UsageError` where there is none."""
    if name not in PRESETS:
        raise unknown_name("--model", name, PRESETS)
    return PRESETS[name]


def param_count(config: LlamaConfig) -> int:
    """Returns the number of parameters, embeddings and head included."""
    D, F = config.hidden_size, config.intermediate_size
    block = 4 * D * D + 3 * D * F + 2 * D
    return 2 * config.vocab_size * D + config.num_layers * block + D
