"""Flattening of rows, columns and singular values, compared with NumPy's SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import ApolloDimensionNumbers, _spectrum
from apollo_optax._dimension_numbers import matrix_axes
from apollo_optax._matrix import Matrix

M, N, RANK = 256, 320, 32
ROWS, COLUMNS = (0,), (1,)
KERNEL = ApolloDimensionNumbers()
LAYOUTS = [
    ((24, 5, 16), ApolloDimensionNumbers(0, 2)),
    ((5, 4, 6, 16), ApolloDimensionNumbers((2, 1), 3)),
    ((5, 16, 4, 6), ApolloDimensionNumbers(1, (2, 3))),
]

index = np.arange(M)
# The largest singular value over the median is 60 and 600 in the last four.
SPECTRA = {
    "rank 1": (index < 1).astype(float),
    "rank 4": (index < 4).astype(float),
    "exponential": np.exp(-index / 8),
    "peaks of 60": np.where(index < 4, 60 * 0.5**index, 1 - 0.5 * index / M),
    "peaks of 600": np.where(index < 4, 600 * 0.5**index, 1 - 0.5 * index / M),
    "decay by 60": (index + 1.0) ** (-np.log(60) / np.log(M / 2)),
    "decay by 600": (index + 1.0) ** (-np.log(600) / np.log(M / 2)),
}
COMPILED = {
    method: jax.jit(getattr(_spectrum, method), static_argnums=0)
    for method in ("exact", "newton_schulz", "low_rank")
}
pytestmark = pytest.mark.usefixtures("quick_compilation")
every_spectrum = pytest.mark.parametrize("name", SPECTRA)
every_method = pytest.mark.parametrize("method", COMPILED)


def matrix_of(shape, numbers=KERNEL, rank=RANK, dtype=jnp.float32):
    axes = matrix_axes(("w",), shape, numbers)
    return Matrix.of_gradient(jnp.zeros(shape, dtype), axes, dtype, rank)


def orthogonal(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def with_spectrum(values, n=N):
    """A matrix of random singular vectors, with entries of root mean square 1."""
    rng = np.random.default_rng(0)
    m = len(values)
    X = (orthogonal(rng, m, m) * values) @ orthogonal(rng, n, m).T
    return X / np.sqrt(np.mean(X**2))


def flattened(X, power):
    """``F(X)`` by the SVD, in float64. Singular values of rounding errors stay out."""
    u, s, v = np.linalg.svd(np.asarray(X, np.float64), full_matrices=False)
    is_real = s > 1e-10 * s[..., :1]
    values = np.where(is_real, s, 1) ** power * is_real
    return (u * values[..., None, :]) @ v


def omega_of(matrix, seed=1):
    shape = matrix.moment_shape
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), matrix.dtype)


def apply(method, matrix, X, power=0.5, omega=None):
    extra = (omega_of(matrix) if omega is None else omega,)
    extra = extra if method == "low_rank" else ()
    return COMPILED[method](matrix, X, power, *extra)


def error(actual, expected):
    """The distance of two matrices that are scaled to a norm of 1."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(
        actual / np.linalg.norm(actual) - expected / np.linalg.norm(expected)
    )


# Comparisons of the methods.


@every_spectrum
def test_exact_is_the_svd(name):
    X = with_spectrum(SPECTRA[name])
    actual = apply("exact", matrix_of(X.shape), jnp.asarray(X, jnp.float32))
    assert error(actual, flattened(X, 0.5)) < 0.02
    np.testing.assert_allclose(
        np.linalg.norm(actual), np.linalg.norm(flattened(X, 0.5)), rtol=2e-3
    )


@every_spectrum
@pytest.mark.parametrize("method", ["newton_schulz", "low_rank"])
def test_error_is_at_most_half_of_that_of_the_input(name, method):
    X = with_spectrum(SPECTRA[name])
    expected = flattened(X, 0.5)
    actual = apply(method, matrix_of(X.shape), jnp.asarray(X, jnp.float32))
    # All singular values of exact rank 1 and 4 are equal, so X is flat already.
    assert error(actual, expected) <= max(0.5 * error(X, expected), 1e-4)
    if method == "newton_schulz":
        assert error(actual, expected) < 0.03


@pytest.mark.parametrize("name", ["peaks of 60", "peaks of 600"])
def test_power_0_brings_all_singular_values_to_one_level(name):
    X = jnp.asarray(with_spectrum(SPECTRA[name]), jnp.float32)
    whitened = apply("newton_schulz", matrix_of(X.shape), X, power=0)
    values = np.linalg.svd(whitened, compute_uv=False)
    assert values[0] / values[-1] < 1.35
    # Low rank brings the largest ones to the level of the others.
    lowered = apply("low_rank", matrix_of(X.shape), X, power=0)
    values, before = (np.linalg.svd(x, compute_uv=False) for x in (lowered, X))
    assert values[0] / values[-1] < 1.2 * before[4] / before[-1]


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 0.75])
def test_newton_schulz_has_the_errors_that_it_documents(power):
    a, b, c = _spectrum.MUON_STEP
    iterates = [np.geomspace(1e-3, 1, 1000)]
    for _ in range(_spectrum.NEWTON_SCHULZ_STEPS):
        s = iterates[-1]
        iterates.append(a * s + b * s**3 + c * s**5)
    weights = _spectrum.newton_schulz_weights(power)
    relative = np.stack(iterates, axis=1) @ weights / iterates[0] ** power
    limits = {0.0: 0.17, 0.25: 0.11, 0.5: 0.06, 0.75: 0.03}
    assert np.abs(relative - 1).max() < limits[power]
    # A traced power gives the same weights.
    traced = jax.jit(_spectrum.newton_schulz_weights)(power)
    np.testing.assert_allclose(traced, weights, atol=1e-5)


@every_spectrum
def test_low_rank_finds_directions_as_good_as_those_of_the_svd(name):
    """At m = 128 too, where even the best 16 directions leave over half the error."""
    X = with_spectrum(SPECTRA[name][: M // 2])
    matrix = matrix_of(X.shape, rank=RANK // 2)
    actual = apply("low_rank", matrix, jnp.asarray(X, jnp.float32))
    u, s, v = np.linalg.svd(X, full_matrices=False)
    level = np.sqrt(max(np.mean(s[matrix.rank :] ** 2), 1e-6 * np.mean(s**2)))
    c = np.where(np.arange(len(s)) < matrix.rank, (s / level + 1e-12) ** -0.5, 1)
    best, expected = (u * (s * c)) @ v, flattened(X, 0.5)
    allowed = error(best, expected) + 0.15 * error(X, expected)
    assert error(actual, expected) <= max(allowed, 1e-4)


def test_low_rank_is_its_formula():
    """An SVD gives it: the largest directions times ``c``, the others unchanged."""
    X = with_spectrum(SPECTRA["peaks of 60"])
    matrix = matrix_of(X.shape)
    actual = apply("low_rank", matrix, jnp.asarray(X, jnp.float32))
    omega = np.asarray(omega_of(matrix), np.float64)
    Q, _ = np.linalg.qr(X @ X.T @ X @ omega.T)
    B = Q.T @ X
    values, W = np.linalg.eigh(B @ B.T)
    level = (np.sum(X**2) - values.sum()) / (M - RANK)
    # The factors are those of the Newton-Schulz iterates, not clipped at 1.
    norm = np.linalg.norm(values / level)
    s = np.sqrt(values / level / norm)
    a, b, c = _spectrum.MUON_STEP
    iterates = [s]
    for _ in range(_spectrum.NEWTON_SCHULZ_STEPS):
        last = iterates[-1]
        iterates.append(a * last + b * last**3 + c * last**5)
    weights = _spectrum.newton_schulz_weights(0.5)
    factors = np.stack(iterates, axis=1) @ weights / s * norm**-0.25
    expected = X + Q @ W @ np.diag(factors - 1) @ W.T @ B
    distance = np.linalg.norm(actual - expected)
    assert distance < 1e-3 * np.linalg.norm(expected)


@every_method
@pytest.mark.parametrize(("shape", "numbers"), LAYOUTS)
def test_axes_in_any_order(shape, numbers, method):
    matrix = matrix_of(shape, numbers, rank=2)
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    axes = matrix.axes
    flat = np.transpose(X, axes.order).reshape(
        *matrix.batch_shape, axes.contracted_size, -1
    )
    omega = omega_of(matrix)
    actual = apply(method, matrix, jnp.asarray(X))
    actual = np.transpose(actual, axes.order).reshape(flat.shape)
    for i, one in enumerate(flat):
        own = matrix_of(one.shape, rank=2)
        own_omega = omega[i].reshape(2, -1)
        expected = apply(method, own, jnp.asarray(one), omega=own_omega)
        np.testing.assert_allclose(actual[i], expected, rtol=1e-4, atol=1e-5)


@every_method
@pytest.mark.parametrize("name", ["peaks of 60", "decay by 600"])
def test_bfloat16_products(name, method, monkeypatch):
    """The test takes the branch for accelerators, which CPUs do not take."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
    function = getattr(_spectrum, method)
    narrow = jax.jit(lambda *args: function(*args), static_argnums=0)
    X = jnp.asarray(with_spectrum(SPECTRA[name]), jnp.bfloat16)
    matrix = matrix_of(X.shape)
    extra = (omega_of(matrix),) if method == "low_rank" else ()
    actual = narrow(matrix, X, 0.5, *extra)
    assert actual.dtype == jnp.float32
    wide = X.astype(jnp.float32)
    expected = flattened(wide, 0.5)
    assert error(actual, expected) <= 0.5 * error(wide, expected)
    assert error(actual, apply(method, matrix, wide)) < 0.05


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_bfloat16_gradients_in_bfloat16(platform):
    matrix = matrix_of((64, 96), rank=8)
    X = jnp.ones((64, 96), jnp.bfloat16)
    traced = jax.jit(lambda X: apply("low_rank", matrix, X)).trace(X)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [
        line.split(" : ")[-1]
        for line in text.splitlines()
        if "stablehlo.dot_general" in line and "64x96" in line.split("->")[0]
    ]
    assert len(products) == 4
    assert all("64x96xbf16" in types for types in products)


@pytest.mark.usefixtures("x64")
@every_method
def test_float64(method):
    X = with_spectrum(SPECTRA["decay by 60"])
    matrix = matrix_of(X.shape, dtype=jnp.float64)
    actual = apply(method, matrix, jnp.asarray(X))
    assert actual.dtype == jnp.float64
    tolerance = {"exact": 1e-10, "newton_schulz": 0.03, "low_rank": 0.3}
    assert error(actual, flattened(X, 0.5)) < tolerance[method]
    # The basis is orthonormal, so the small singular vectors stay as they are.
    if method == "low_rank":
        narrow = apply(method, matrix_of(X.shape), jnp.asarray(X, jnp.float32))
        assert error(narrow, actual) < 1e-4


# Symmetries.


normalize = jax.jit(_spectrum.normalize, static_argnums=(1, 2))
rms_one = jax.jit(_spectrum.rms_one, static_argnums=(2, 3))


def whole(method, G, **settings):
    """The whole rule for a matrix with rows first."""
    X = normalize(jnp.asarray(G, jnp.float32), ROWS, COLUMNS)
    U = apply(method, matrix_of(X.shape, **settings), X)
    return np.asarray(rms_one(U, X, ROWS, COLUMNS))


def small(seed=0, shape=(24, 40)):
    return np.random.default_rng(seed).normal(size=shape)


@every_method
@pytest.mark.parametrize("factor", [1e-3, 3.0, -1.0])
def test_the_update_has_the_sign_but_not_the_size_of_the_gradient(method, factor):
    G = small()
    actual, expected = (whole(method, x, rank=4) for x in (factor * G, G))
    np.testing.assert_allclose(actual, np.sign(factor) * expected, atol=2e-5)


@every_method
def test_positive_factors_per_row_change_nothing(method):
    G = small()
    D = np.exp(2 * np.random.default_rng(1).normal(size=(24, 1)))
    actual, expected = (whole(method, x, rank=4) for x in (D * G, G))
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    # The columns are divided second, so factors per column do change the update.
    other = whole(method, G * np.linspace(0.2, 5, 40), rank=4)
    assert np.abs(other - expected).max() > 0.05


@every_method
def test_permutations_of_rows(method):
    G, order = small(), np.random.default_rng(1).permutation(24)
    expected = whole(method, G, rank=4)[order]
    np.testing.assert_allclose(whole(method, G[order], rank=4), expected, atol=2e-5)


@pytest.mark.parametrize("method", ["exact", "newton_schulz"])
def test_permutations_of_columns(method):
    G, order = small(), np.random.default_rng(1).permutation(40)
    expected = whole(method, G)[:, order]
    np.testing.assert_allclose(whole(method, G[:, order]), expected, atol=2e-5)


@every_method
def test_flattening_commutes_with_rotations(method):
    rng = np.random.default_rng(1)
    X = with_spectrum(np.exp(-np.arange(24) / 4), 40)
    R, S = orthogonal(rng, 24, 24), orthogonal(rng, 40, 40)
    matrix = matrix_of(X.shape, rank=4)
    omega = np.asarray(omega_of(matrix))

    def apply_with(X, omega):
        X, omega = (jnp.asarray(x, jnp.float32) for x in (X, omega))
        return apply(method, matrix, X, omega=omega)

    expected = R @ np.asarray(apply_with(X, omega)) @ S
    # A rotation of columns rotates the random projection of low rank.
    actual = apply_with(R @ X @ S, omega @ S)
    np.testing.assert_allclose(actual, expected, atol=5e-4)


# Rows and columns, magnitudes, and gradients with little in them.


def test_normalize_divides_rows_and_then_columns():
    G = small()
    rows = G / np.sqrt(np.mean(G**2, axis=1, keepdims=True))
    expected = rows / np.sqrt(np.mean(rows**2, axis=0, keepdims=True))
    actual = normalize(jnp.asarray(G, jnp.float32), ROWS, COLUMNS)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    other = normalize(jnp.asarray(G.T, jnp.float32), COLUMNS, ROWS)
    np.testing.assert_allclose(other, expected.T, rtol=1e-5)


@every_method
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e10, 1e15])
def test_any_magnitude(method, magnitude):
    actual = whole(method, magnitude * small(), rank=4)
    np.testing.assert_allclose(actual, whole(method, small(), rank=4), atol=2e-5)


@every_method
def test_magnitudes_that_differ_by_row(method):
    G, exponents = small(), np.linspace(-30, 15, 24)
    actual = whole(method, 10 ** exponents[:, None] * G, rank=4)
    np.testing.assert_allclose(actual, whole(method, G, rank=4), atol=2e-5)


@every_method
def test_zero_matrix(method):
    np.testing.assert_array_equal(whole(method, np.zeros((24, 40)), rank=4), 0)


@every_method
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("alive", [[5], [1, 7, 8]])
def test_rms_is_1_over_live_rows_and_columns(method, axis, alive):
    G = np.zeros((48, 64))
    live = np.take(G, alive, axis)
    np.moveaxis(G, axis, 0)[alive] = np.moveaxis(small(0, live.shape), axis, 0)
    U = whole(method, G, rank=4)
    live = np.take(U, alive, axis)
    np.testing.assert_allclose(np.sqrt(np.mean(live**2)), 1, rtol=1e-3)
    assert np.abs(np.delete(U, alive, axis)).max() < 1e-2


@every_method
@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_of_low_rank(method, rank):
    rng = np.random.default_rng(0)
    G = rng.normal(size=(64, rank)) @ rng.normal(size=(rank, 96))
    U = whole(method, G, rank=8)
    assert np.isfinite(U).all()
    X = normalize(jnp.asarray(G, jnp.float32), ROWS, COLUMNS)
    assert error(U, flattened(X, 0.5)) < 0.02
    assert np.linalg.matrix_rank(U, tol=1e-2 * np.linalg.norm(U)) <= rank


@pytest.mark.parametrize("kind", ["rank 1", "equal rows", "almost rank 1", "rank 2"])
@pytest.mark.parametrize("shape", [(256, 384), (512, 640)])
def test_wide_gradients_of_low_rank(kind, shape):
    """All columns of `X Omega` are almost the same, as for an expert with one token."""
    rng = np.random.default_rng(0)
    rank = 2 if kind == "rank 2" else 1
    left = np.ones((shape[0], 1)) if kind == "equal rows" else None
    left = rng.normal(size=(shape[0], rank)) if left is None else left
    G = left @ rng.normal(size=(rank, shape[1]))
    if kind == "almost rank 1":
        G += 1e-7 * rng.normal(size=shape)
    U = whole("low_rank", G, rank=shape[0] // 8)
    X = normalize(jnp.asarray(G, jnp.float32), ROWS, COLUMNS)
    assert error(U, flattened(X, 0.5)) < 0.02


@pytest.mark.parametrize("rank", [1, 2])
def test_a_basis_of_almost_equal_columns_is_finite_at_the_width_of_7b(rank):
    rng = np.random.default_rng(rank)
    V = rng.normal(size=(4096, rank)) @ rng.normal(size=(rank, 512))
    V = jnp.asarray(V, jnp.float32)
    gram = jnp.matmul(V.T, V, precision=_spectrum.HIGHEST)
    inverse = _spectrum._inverse_of_factor(gram, 4096**0.5)
    assert jnp.isfinite(inverse).all()
