from types import SimpleNamespace

import pytest

from examples.llama.config import (
    PRESETS,
    LlamaConfig,
    matmul_param_count,
    param_count,
)
from examples.llama.flops import flops_per_token, mfu, peak_flops


def test_flops_of_a_shape_counted_by_hand() -> None:
    # Parameters of a layer: 2 * 8 * 12 of queries and outputs, 2 * 8 * 4 of keys and
    # values, and 3 * 8 * 10 of the MLP. The head has 32 * 8.
    config = LlamaConfig(
        32, 8, 10, num_heads=3, num_layers=2, num_kv_heads=1, head_size=4
    )
    matmul_params = 2 * (192 + 64 + 240) + 256
    # Per layer, the scores and their product with the values take 2 * 2 * 3 * 4 * 5
    # flops. With the gradient, they take three times as many.
    assert flops_per_token(config, seq=5) == 6 * matmul_params + 3 * 2 * 240


def test_flops_of_the_papers_1b() -> None:
    # Each of the 24 layers has 4 * 2048^2 + 3 * 2048 * 5461 parameters, and the head
    # has 32000 * 2048. Attention takes 12 * 24 * 2048 * 1024 flops.
    assert flops_per_token(PRESETS["1b"], seq=1024) == 6 * 1_273_446_400 + 603_979_776


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        # 32 layers have two norms each, and one norm is last.
        ("llama-3.1-8b", 65 * 4096),
        ("mistral-7b", 65 * 4096),
        # These have biases for 28 heads of queries, 4 of keys and 4 of values, too.
        ("qwen2.5-7b", 57 * 3584 + 28 * 36 * 128),
        # These have norms of a head's size for queries and for keys, too.
        ("qwen3-8b", 73 * 4096 + 36 * 2 * 128),
    ],
)
def test_norms_biases_and_the_embedding_take_no_flops(name: str, vectors: int) -> None:
    config = PRESETS[name]
    embedding = config.vocab_size * config.hidden_size
    assert matmul_param_count(config) == param_count(config) - embedding - vectors
    attention = config.num_layers * config.num_heads * config.head_size * 1024
    assert flops_per_token(config, seq=1024) == (
        6 * matmul_param_count(config) + 12 * attention
    )


def test_the_embedding_takes_no_flops_but_a_tied_head_does() -> None:
    untied = LlamaConfig(32, 8, 10, 2, 2)
    tied = LlamaConfig(32, 8, 10, 2, 2, tied_head=True)
    assert flops_per_token(untied, 4) == flops_per_token(tied, 4)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_peaks(kind: str, tera: float) -> None:
    assert peak_flops(kind, "bfloat16") == tera * 1e12
    assert peak_flops(kind, "float32") is None


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "TPU v50",
        "NVIDIA A1000",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_devices_of_unknown_peak(kind: str) -> None:
    assert peak_flops(kind, "bfloat16") is None


def test_utilisation_is_relative_to_all_devices_together() -> None:
    config = PRESETS["350m"]
    half = 0.5 * 989e12 / flops_per_token(config, 1024)
    h200, cpu = (
        SimpleNamespace(device_kind="NVIDIA H200"),
        SimpleNamespace(device_kind="cpu"),
    )
    assert mfu(half, config, 1024, [h200], "bfloat16") == pytest.approx(0.5)
    assert mfu(half, config, 1024, [h200, h200], "bfloat16") == pytest.approx(0.25)
    assert mfu(half, config, 1024, [h200, cpu], "bfloat16") is None
    assert mfu(half, config, 1024, [h200], "float32") is None
