"""Model flops, and their share of an accelerator's peak."""

import re
from collections.abc import Sequence
from typing import Any

from examples.llama.config import LlamaConfig, adapter_count, matmul_param_count

# Dense (no sparsity) bfloat16 flops per second of one JAX device, with products summed
# in float32, by the start of its `device_kind`. The numbers are from the makers' data
# sheets. A JAX device is a chip, but one of two cores of a TPU v3 or TPU7x chip.
PEAK_BFLOAT16_FLOPS: dict[str, float] = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 137e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}
# Slices of a GPU, and GPUs that share only the name of one above, are not in the table.
OTHER_DEVICE = re.compile(r" (MIG|Laptop|D|Ti)\b")


def flops_per_token(config: LlamaConfig, seq: int) -> float:
    """Returns the flops of a training step, forward and backward, per token.

    These are model flops as in appendix B of PaLM (https://arxiv.org/abs/2204.02311).
    They count the operations of the equations, without recomputed activations and
    without the optimizer. Attention's two products count for all `seq` positions,
    though half of them are masked.

    Args:
        config: the shape.
        seq: tokens per sequence.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_size * seq
    # Weights that are frozen have no gradients, which are a third of the flops.
    flops = 4 if config.lora_rank else 6
    return float(
        flops * matmul_param_count(config) + 6 * adapter_count(config) + attention
    )


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the dense flops per second of a JAX device, or None if not in the table.

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: the dtype of the matrix products. Only bfloat16 is in the table.
    """
    if dtype != "bfloat16" or OTHER_DEVICE.search(device_kind):
        return None
    # The longest matching name counts, and only whole words match. Otherwise an
    # unlisted kind would find the name of a shorter one.
    names = [
        name
        for name in PEAK_BFLOAT16_FLOPS
        if re.match(rf"{re.escape(name)}(?![^\s-])", device_kind)
    ]
    return PEAK_BFLOAT16_FLOPS[max(names, key=len)] if names else None


def mfu(
    tokens_per_s: float,
    config: LlamaConfig,
    seq: int,
    devices: Sequence[Any],
    dtype: str,
) -> float | None:
    """Returns the model-flops utilisation of all `devices`, from 0 to 1.

    It is None if a device's peak is unknown.

    Args:
        tokens_per_s: tokens per second over all devices.
        config: the shape.
        seq: tokens per sequence.
        devices: the JAX devices that train.
        dtype: the dtype of the matrix products.
    """
    peaks = [peak_flops(device.device_kind, dtype) for device in devices]
    total = sum(peak for peak in peaks if peak is not None)
    return (
        None
        if None in peaks or not total
        else tokens_per_s * flops_per_token(config, seq) / total
    )
