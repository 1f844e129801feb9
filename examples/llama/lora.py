"""LoRA adapters: their parameters, and the sums of adapters and kernels.

An adapter (https://arxiv.org/abs/2106.09685) of rank r beside a kernel W (in, out) is a
matrix A (in, r) and a matrix B (r, out). The layer then computes xW + (alpha / r) xAB.
The matrices are stacked over the layers as the kernels are: (L, in, r) and (L, r, out).
Training changes only them, so only they are in a run's state and in its checkpoints.
"""

import re

import numpy as np

from examples.llama.config import LlamaConfig
from examples.llama.model import Params, flatten, unflatten

# The groups are the path of the layer and the letter of the matrix.
ADAPTERS = r"^(layers/.*)/lora/lora_([ab])$"


def adapters_of(params: Params) -> Params:
    """Returns the adapters of a tree of parameters."""
    return _select(params, adapters=True)


def without_adapters(params: Params) -> Params:
    """Returns the model's own parameters."""
    return _select(params, adapters=False)


def _select(params: Params, *, adapters: bool) -> Params:
    return unflatten(
        {
            path: leaf
            for path, leaf in flatten(params).items()
            if bool(re.search(ADAPTERS, path)) == adapters
        }
    )


def joined(params: Params, frozen: Params | None) -> Params:
    """Returns all parameters, from the trained ones and the others, if any."""
    return params if frozen is None else unflatten(flatten(frozen) | flatten(params))


def merge(base: Params, adapters: Params, config: LlamaConfig) -> None:
    """Adds the adapters to the kernels of `base`, in place.

    The products and sums are in float32 and are rounded once, to the kernels' dtype.

    Args:
        base: the model's own parameters, in numpy arrays.
        adapters: the adapters beside its kernels, in numpy or jax arrays.
        config: the shape with the adapters.
    """
    kernels, leaves = flatten(base), flatten(adapters)
    for path in leaves:
        name, letter = re.findall(ADAPTERS, path)[0]
        if letter == "b":
            continue
        for layer in range(config.num_layers):
            a_IxR, b_RxO = (
                np.asarray(leaves[f"{name}/lora/lora_{matrix}"][layer], np.float32)
                for matrix in "ab"
            )
            kernel_IxO = kernels[f"{name}/kernel"][layer]
            kernel_IxO[...] = kernel_IxO + config.lora_scale * (a_IxR @ b_RxO)
