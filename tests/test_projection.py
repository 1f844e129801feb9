"""What each kind of projection draws or computes, and from which keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from apollo_optax import ApolloDimensionNumbers, _keys
from apollo_optax._dimension_numbers import matrix_axes
from apollo_optax._matrix import Matrix
from apollo_optax._projection import NAMED

pytestmark = pytest.mark.usefixtures("quick_compilation")


def matrix_of(shape, rank=16, reduction=-2, output=-1, dtype=jnp.float32):
    numbers = ApolloDimensionNumbers(reduction, output)
    axes = matrix_axes(("leaf",), shape, numbers)
    return Matrix.of_gradient(jnp.zeros(shape), axes, dtype, rank)


def draw(kind, matrix, seed=0, leaf=7, refresh=0):
    source = _keys.KeySource(jax.random.key(seed), jnp.array(refresh), jnp.array(0))
    return NAMED[kind].draw(matrix, source.leaf_keys(leaf, matrix.batch_shape))


def test_normal_entries():
    drawn = draw("random", matrix_of((500, 600), 100))
    entries = np.asarray(drawn).ravel() * np.sqrt(100)
    assert stats.kstest(entries, "norm").pvalue > 1e-3
    assert abs(entries.var() - 1) < 5 * np.sqrt(2 / entries.size)


def test_rademacher_entries():
    # 501 is not a multiple of the 32 signs in a word.
    projection = np.asarray(draw("rademacher", matrix_of((501, 600), 100)))
    assert projection.shape == (100, 501)
    np.testing.assert_allclose(np.abs(projection), 0.1, rtol=1e-6)
    signs = np.sign(projection)
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    # Neighbouring bits are independent along rows, columns and words.
    for products in (
        signs[:, 1:] * signs[:, :-1],
        signs[1:] * signs[:-1],
        signs[:, 32:] * signs[:, :-32],
    ):
        assert abs(products.mean()) < 5 / np.sqrt(products.size)


@pytest.mark.parametrize("kind", ["random", "rademacher"])
def test_norms_are_preserved_on_average(kind):
    # |P x|^2 has mean 1 for a unit vector. Its variance is 2/r for normal entries, and
    # smaller by 2 sum(x^4) / r for random signs.
    m, rank, draws = 32, 8, 4000
    x = np.random.default_rng(0).normal(size=m)
    x /= np.linalg.norm(x)
    projections = draw(kind, matrix_of((draws, m, m), rank), seed=1, leaf=0)
    squares = np.square(np.asarray(projections) @ x).sum(1)
    variance = (2 if kind == "random" else 2 - 2 * np.sum(x**4)) / rank
    assert abs(squares.mean() - 1) < 4 * np.sqrt(variance / draws)
    assert abs(squares.var() / variance - 1) < 0.15


@pytest.mark.parametrize("kind", ["random", "rademacher"])
def test_each_batch_element_leaf_and_refresh_draws_its_own(kind):
    matrix = matrix_of((64, 256))
    base = draw(kind, matrix)
    for other in ({"seed": 1}, {"leaf": 8}, {"refresh": 1}):
        assert not np.allclose(base, draw(kind, matrix, **other))
    stacked = draw(kind, matrix_of((3, 64, 256)))
    assert stacked.shape == (3, 16, 64)
    # Element 0 of a stack draws what a leaf without batch axes does.
    np.testing.assert_array_equal(stacked[0], base)
    assert not np.allclose(stacked[0], stacked[1])


@pytest.mark.parametrize("kind", ["random", "rademacher"])
def test_several_contracted_axes_are_one_side(kind):
    several = draw(kind, matrix_of((4, 16, 256), 16, (0, 1), 2))
    assert several.shape == (16, 4, 16)
    expected = draw(kind, matrix_of((64, 256)))
    np.testing.assert_array_equal(several.reshape(16, 64), expected)


def test_leaf_ids_are_stable_and_distinct():
    # The numbers are part of the format, so that a checkpoint resumes with the same
    # projections. This one is the first eight digits of
    # `printf layers/mlp/kernel | sha256sum`.
    assert _keys.leaf_id(("layers", "mlp", "kernel")) == 0xE1C30666
    ids = {int(_keys.leaf_id(("layers", str(i), "kernel"))) for i in range(1000)}
    assert len(ids) == 1000


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 6, 10), (2, 3, 10)])
def test_svd_signs(shape):
    sides = ((0, 1), 2) if shape == (2, 3, 10) else (-2, -1)
    matrix, svd = matrix_of(shape, 4, *sides), NAMED["svd"]
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def refresh(gradient, previous):
        every = np.ones(matrix.batch_shape, bool)
        return svd.refresh(matrix, gradient, jnp.asarray(previous), every)

    first = refresh(gradient, np.zeros(matrix.projection_shape))
    rows = np.asarray(first).reshape(-1, 6)
    assert np.all(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1) > 0)
    # The same subspace again keeps every row, and the opposite rows come back negated.
    previous = rows.reshape(matrix.projection_shape)
    for before in (previous, -previous):
        np.testing.assert_allclose(refresh(gradient, before), before, atol=1e-6)
    other = jnp.asarray(rng.normal(size=shape), jnp.float32)
    turned = np.asarray(refresh(other, previous)).reshape(-1, 6)
    assert np.all(np.sum(turned * rows, axis=1) >= 0)
    axes = matrix.axes
    order = (*axes.batch, *axes.contracted, *axes.channel)
    matrices = np.transpose(other, order).reshape(-1, 6, 10)
    expected = np.linalg.svd(matrices)[0][:, :, :4].swapaxes(1, 2).reshape(-1, 6)
    np.testing.assert_allclose(np.abs(np.sum(expected * turned, axis=1)), 1, atol=1e-5)
