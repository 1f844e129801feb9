"""A leaf as a matrix: the product with the projection, norms per scaling factor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import ApolloDimensionNumbers
from apollo_optax._dimension_numbers import matrix_axes
from apollo_optax._matrix import SCALE_TYPES, Matrix

KERNEL = ApolloDimensionNumbers()
LAYOUTS = [
    ((16, 24), KERNEL),
    ((24, 5, 16), ApolloDimensionNumbers(0, 2)),
    ((5, 4, 6, 16), ApolloDimensionNumbers((2, 1), 3)),
    ((5, 16, 4, 6), ApolloDimensionNumbers(1, (2, 3))),
]


def matrix_of(shape, numbers=KERNEL, rank=4):
    axes = matrix_axes(("w",), shape, numbers)
    return Matrix.of_gradient(jnp.zeros(shape), axes, jnp.float32, rank)


def project(matrix, projection, tensor):
    return matrix.project(projection, tensor, jnp.zeros(matrix.moment_shape))


def as_matrices(matrix, tensor):
    """A leaf as ``(*batch, m, n)``, by NumPy."""
    axes = matrix.axes
    order = (*axes.batch, *axes.contracted, *axes.channel)
    shape = (*matrix.batch_shape, axes.contracted_size, -1)
    return np.transpose(np.asarray(tensor, np.float64), order).reshape(shape)


def random_arrays(matrix, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tensor = jnp.asarray(rng.normal(size=matrix.axes.shape), dtype)
    shape = matrix.projection_shape
    return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32), tensor


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((256, 384), ApolloDimensionNumbers()),
        ((3, 384, 256), ApolloDimensionNumbers(1, 2)),
    ],
)
def test_bfloat16_products_are_exact_for_the_rounded_projection(
    shape, numbers, monkeypatch
):
    """Accelerators compute them so. The unrounded projection gives them within 0.2%."""
    # Takes the branch for accelerators, which CPUs can compute as well.
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
    matrix = matrix_of(shape, numbers, rank=64)
    projection, tensor = random_arrays(matrix, jnp.bfloat16)
    projected = project(matrix, projection, tensor)
    assert projected.dtype == jnp.float32

    def error(projection):
        exact = np.asarray(projection, np.float64) @ as_matrices(matrix, tensor)
        return np.linalg.norm(projected - exact) / np.linalg.norm(exact)

    assert error(projection.astype(jnp.bfloat16)) < 1e-6
    assert 1e-4 < error(projection) < 2e-3


def test_only_cpus_widen_a_bfloat16_gradient():
    """Lowered for a GPU or a TPU, the product has no float32 operand."""
    matrix = matrix_of((64, 96), rank=8)
    arguments = jnp.ones((8, 64)), jnp.ones((64, 96), jnp.bfloat16)
    traced = jax.jit(lambda *args: project(matrix, *args)).trace(*arguments)
    for platform, dtype in (("cuda", "bf16"), ("tpu", "bf16"), ("cpu", "f32")):
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = lowered.splitlines()
        (product,) = (line for line in lines if "stablehlo.dot_general" in line)
        operands = f"(tensor<8x64x{dtype}>, tensor<64x96x{dtype}>)"
        assert f"{operands} -> tensor<8x96xf32>" in product


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "numbers"), LAYOUTS)
def test_rank_1_is_the_first_row_of_any_rank(shape, numbers, dtype):
    matrix = matrix_of(shape, numbers, rank=2)
    projection, tensor = random_arrays(matrix, dtype)
    rank_axis = len(matrix.batch_shape)
    row = jax.lax.slice_in_dim(projection, 0, 1, axis=rank_axis)
    both = project(matrix, projection, tensor)
    expected = jax.lax.slice_in_dim(both, 0, 1, axis=rank_axis)
    projected = project(matrix_of(shape, numbers, rank=1), row, tensor)
    np.testing.assert_allclose(projected, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize(("shape", "numbers"), LAYOUTS)
def test_norms_per_scaling_factor(shape, numbers, scale_type):
    """The norms of R and the norms of G belong to the same factors."""
    matrix = matrix_of(shape, numbers)
    projection, tensor = random_arrays(matrix)
    moment = project(matrix, projection, tensor)
    gradients = as_matrices(matrix, tensor)
    moments = np.asarray(moment, np.float64).reshape(*gradients.shape[:-2], 4, -1)
    axis, keepdims = ((-2, -1), True) if scale_type == "tensor" else (-2, False)
    for norms, matrices in (
        (matrix.norms(moment, SCALE_TYPES[scale_type]), moments),
        (matrix.gradient_norms(tensor, SCALE_TYPES[scale_type]), gradients),
    ):
        expected = np.linalg.norm(matrices, axis=axis, keepdims=keepdims)
        assert norms.ndim == len(matrix.batch_shape) + len(matrix.axes.channel)
        np.testing.assert_allclose(
            np.ravel(norms), np.ravel(expected), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize(("shape", "numbers"), LAYOUTS)
def test_a_gpu_sums_two_norms_in_one_reduction(shape, numbers, scale_type, monkeypatch):
    matrix = matrix_of(shape, numbers)
    first, second = (
        jnp.asarray(np.random.default_rng(seed).normal(size=matrix.moment_shape))
        for seed in (1, 2)
    )
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args)
    )
    norms_of_two = functools.partial(
        matrix.norms_of_two, scale_type=SCALE_TYPES[scale_type]
    )
    reductions = str(jax.make_jaxpr(norms_of_two)(first, second)).count(" reduce")
    assert reductions == (1 if scale_type == "channel" else 2)
    for norms, moment in zip(norms_of_two(first, second), (first, second), strict=True):
        np.testing.assert_allclose(
            norms, matrix.norms(moment, SCALE_TYPES[scale_type]), rtol=1e-6
        )


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize(("shape", "numbers"), LAYOUTS)
def test_the_norm_of_the_update_needs_no_update(shape, numbers, scale_type):
    """``|U|^2 = sum_j s_j^2 |G_j|^2`` for every scale type there is."""
    matrix = matrix_of(shape, numbers)
    projection, tensor = random_arrays(matrix)
    factors = matrix.norms(project(matrix, projection, tensor), SCALE_TYPES[scale_type])
    update = as_matrices(matrix, matrix.scale(tensor, factors))
    expected = np.linalg.norm(update, axis=(-2, -1))
    norms = matrix.matrix_norms(
        factors * matrix.gradient_norms(tensor, SCALE_TYPES[scale_type])
    )
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
