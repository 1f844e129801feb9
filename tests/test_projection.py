import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from apollo_optax import _projection
from apollo_optax._dimension_numbers import ApolloDimensionNumbers, matrix_axes


def axes_of(shape, reduction, output):
    return matrix_axes(("leaf",), shape, ApolloDimensionNumbers(reduction, output))


def draw(kind, shape=(64, 256), rank=16, seed=0, dtype=jnp.float32):
    axes = axes_of(shape, -2, -1)
    keys = _projection.batch_keys(jax.random.key(seed), 7, jnp.array(0), axes.batch_size)
    return _projection.draw(kind, keys, axes, rank, dtype)


def test_normal_entries():
    entries = np.asarray(draw("random", (500, 600), 100)).ravel() * np.sqrt(100)
    assert stats.kstest(entries, "norm").pvalue > 1e-3
    assert abs(entries.var() - 1) < 5 * np.sqrt(2 / entries.size)


def test_rademacher_entries():
    projection = np.asarray(draw("rademacher", (501, 600), 100))
    assert projection.shape == (100, 501)  # 501 is not a multiple of the 32 signs in a word.
    np.testing.assert_allclose(np.abs(projection), 0.1, rtol=1e-6)
    signs = np.sign(projection)
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    # No bit of a word follows another, along rows, columns or words.
    for shifted in (signs[:, 1:] * signs[:, :-1], signs[1:] * signs[:-1], signs[:, 32:] * signs[:, :-32]):
        assert abs(shifted.mean()) < 5 / np.sqrt(shifted.size)


@pytest.mark.parametrize("kind", ["random", "rademacher"])
def test_norms_are_preserved_on_average(kind):
    # |P x|^2 has mean 1 for a unit vector; its variance is 2/r for normal entries and smaller by
    # 2 sum(x^4) / r for random signs.
    m, rank, draws = 32, 8, 4000
    x = np.random.default_rng(0).normal(size=m)
    x /= np.linalg.norm(x)
    shape = (draws, m, m)
    axes = matrix_axes(("leaf",), shape, ApolloDimensionNumbers(1, 2))
    keys = _projection.batch_keys(jax.random.key(1), 0, jnp.array(0), draws)
    squares = np.square(np.asarray(_projection.draw(kind, keys, axes, rank, jnp.float32)) @ x).sum(1)
    variance = (2 if kind == "random" else 2 - 2 * np.sum(x**4)) / rank
    assert abs(squares.mean() - 1) < 4 * np.sqrt(variance / draws)
    assert abs(squares.var() / variance - 1) < 0.15


@pytest.mark.parametrize("kind", ["random", "rademacher"])
def test_each_batch_element_leaf_and_refresh_has_its_own(kind):
    base = draw(kind)
    assert not np.allclose(base, draw(kind, seed=1))
    stacked = draw(kind, (3, 64, 256))
    assert stacked.shape == (3, 16, 64)
    np.testing.assert_array_equal(stacked[0], base)  # A stack of one is the matrix alone.
    assert not np.allclose(stacked[0], stacked[1])
    axes = axes_of((64, 256), 0, 1)
    other_leaf = _projection.batch_keys(jax.random.key(0), 8, jnp.array(0), 1)
    other_refresh = _projection.batch_keys(jax.random.key(0), 7, jnp.array(1), 1)
    for keys in (other_leaf, other_refresh):
        assert not np.allclose(base, _projection.draw(kind, keys, axes, 16, jnp.float32))


@pytest.mark.parametrize("kind", ["random", "rademacher"])
def test_several_contracted_axes_are_one_side(kind):
    axes = axes_of((4, 16, 256), (0, 1), 2)
    keys = _projection.batch_keys(jax.random.key(0), 7, jnp.array(0), 1)
    several = _projection.draw(kind, keys, axes, 16, jnp.float32)
    assert several.shape == (16, 4, 16)
    np.testing.assert_array_equal(several.reshape(16, 64), draw(kind))


def test_leaf_ids_are_stable_and_apart():
    # The numbers are part of the format: a checkpoint resumes with the projections it left with.
    # This one is the first eight digits of `printf layers/mlp/kernel | sha256sum`.
    assert _projection.leaf_id(("layers", "mlp", "kernel")) == 0xE1C30666
    ids = {int(_projection.leaf_id(("layers", str(i), "kernel"))) for i in range(1000)}
    assert len(ids) == 1000


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 6, 10), (2, 3, 10)])
def test_svd_signs(shape):
    numbers = ApolloDimensionNumbers((0, 1), 2) if shape == (2, 3, 10) else ApolloDimensionNumbers(-2, -1)
    axes = matrix_axes(("leaf",), shape, numbers)
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(rng.normal(size=shape), jnp.float32)
    zero = jnp.zeros(axes.projection_shape(4))
    rows = np.asarray(_projection.from_svd(gradient, zero, axes, 4)).reshape(-1, 6)
    assert np.all(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1) > 0)
    # The same subspace again keeps every row; the opposite rows come back negated.
    previous = rows.reshape(zero.shape)
    np.testing.assert_allclose(_projection.from_svd(gradient, previous, axes, 4), previous, atol=1e-6)
    np.testing.assert_allclose(_projection.from_svd(gradient, -previous, axes, 4), -previous, atol=1e-6)
    other = jnp.asarray(rng.normal(size=shape), jnp.float32)
    turned = np.asarray(_projection.from_svd(other, previous, axes, 4)).reshape(-1, 6)
    assert np.all(np.sum(turned * rows, axis=1) >= 0)
    matrices = np.asarray(axes.to_matrix(other)).reshape(-1, 6, 10)
    expected = np.linalg.svd(matrices)[0][:, :, :4].swapaxes(1, 2).reshape(-1, 6)
    np.testing.assert_allclose(np.abs(np.sum(expected * turned, axis=1)), 1, atol=1e-5)
