"""Arrays for the tests of quantization, and their values by NumPy."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax._quantization import quantize

# Compiles with the default options, in spite of the fixture quick_compilation.
optimized: Any = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    },
)


def normal(seed, shape, dtype: Any = np.float32):
    """A normal array of NumPy, as JAX would compile a program to draw it."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def codes_of(quantized, *, padded=False):
    """The code of each weight, out of the blocks; if `padded`, with the padding."""
    first = quantized.ndim + quantized.axis
    end = first + quantized.qvalue.ndim - quantized.ndim + 1
    shape = list(quantized.qvalue.shape)
    shape[first:end] = [math.prod(shape[first:end])]
    codes = np.asarray(quantized.qvalue, np.int32).reshape(shape)
    if padded:
        return codes
    return np.take(codes, range(quantized.shape[quantized.axis]), quantized.axis)


def by_weight(part, quantized):
    """The element of `part` that belongs to each weight's group, in float64."""
    n = quantized.shape[quantized.axis]
    part = np.asarray(part).astype(np.float64)
    repeated = np.repeat(part, quantized.group_size, quantized.axis)
    return np.take(repeated, range(n), quantized.axis)


def steps_of(quantized):
    """The rounding step of each weight."""
    return by_weight(quantized.scale, quantized)


def values_of(quantized):
    """The values before dequantize casts them, computed by NumPy in float64."""
    zero_points = by_weight(quantized.zero_point, quantized)
    return (codes_of(quantized) - zero_points) * steps_of(quantized)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def layers():
    """Stacks of four layers in int8 and bfloat16, and updates of them."""
    array = normal(0, (4, 40, 8))
    params = {
        "int8": quantize(array, group_size=16),
        "bfloat16": jnp.asarray(array.astype(jnp.bfloat16)),
        "gain": jnp.asarray(normal(2, (4,), jnp.bfloat16)),
    }
    updates = {
        name: 0.003 * normal(seed, x.shape)
        for seed, (name, x) in enumerate(params.items(), 3)
    }
    return params, updates
