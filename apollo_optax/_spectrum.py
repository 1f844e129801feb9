"""A gradient's singular values brought closer to each other; no state.

``X`` is a leaf as matrices ``(m, n)``, the contracted side first, which is the smaller
one. Flattening its spectrum to the power ``p`` is ``F(X) = (X X^T)^((p - 1) / 2) X``:
the singular values ``s`` become ``s^p``, and the singular vectors stay.

The functions take the leaf with its axes in any order, since a reshape that merges a
sharded axis with another would make XLA gather the leaf. Only Gram matrices are merged.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax import _sharding
from apollo_optax._dtypes import one_if_zero
from apollo_optax._matrix import HIGHEST, Matrix, product

Axes = tuple[int, ...]

# The coefficients of Muon's Newton-Schulz step, s -> a s + b s^3 + c s^5. Six steps
# take singular values of a thousandth near 1.
MUON_STEP = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 6

# The degree of the weights of the iterates as a polynomial of the power. With a lower
# one, their errors exceed those of the iterates themselves.
WEIGHT_DEGREE = 8

# The smallest singular value that the weights of the Newton-Schulz iterates are fitted
# for. It is relative to the fourth root of the sum of all fourth powers.
SMALLEST_FITTED = 1e-3

# The floor of a Gram matrix's eigenvalues relative to the largest one, in units of the
# dtype's epsilon. Rounding errors decide smaller eigenvalues.
EIGENVALUE_FLOOR = 8

# What a Cholesky decomposition adds to ones on the diagonal, in units of the dtype's
# epsilon. Rounding errors of the Gram matrix would otherwise make it indefinite.
CHOLESKY_SHIFT = 100

# If that is not enough, this times the square root of the number of products in a sum
# is added. The rounding errors of columns that are almost the same grow like that.
LARGE_CHOLESKY_SHIFT = 100

# How often a basis is divided by its Cholesky factor. The first basis only has to be
# well conditioned. The second has to be orthonormal, even where the rank of X is
# smaller than its number of columns.
FIRST_PASSES, SECOND_PASSES = 1, 3

# The floor of the mean square of the singular values that low rank leaves as they are,
# relative to the mean square of all. Rounding errors decide it where X has low rank.
SMALLEST_LEVEL = 1e-6


# Rows and columns.


def normalize(tensor: jax.Array, rows: Axes, columns: Axes) -> jax.Array:
    """Divides each row by its root mean square, then each column by its own.

    The rows are not divided again after the columns. Zero rows and columns stay zero.

    Args:
      tensor: a leaf of any magnitude.
      rows: the axes of the input side, whose elements are rows.
      columns: the axes of the output side, whose elements are columns.
    """
    return _unit_rms(_unit_rms(tensor, columns), rows)


def _unit_rms(tensor: jax.Array, axes: Axes) -> jax.Array:
    # Division by the largest magnitude comes first, so that no square overflows or
    # underflows.
    largest = jnp.max(jnp.abs(tensor), axis=axes, keepdims=True)
    scaled = tensor / one_if_zero(largest)
    rms = jnp.sqrt(jnp.mean(jnp.square(scaled), axis=axes, keepdims=True))
    return scaled / jnp.where(largest == 0, 1, rms)


def rms_one(tensor: jax.Array, like: jax.Array, rows: Axes, columns: Axes) -> jax.Array:
    """Scales matrices to a root mean square of 1, without zero rows and columns.

    If these counted, the few entries of a matrix with one live row or column would get
    much larger updates than Adam's.

    Args:
      tensor: a leaf of moderate magnitude.
      like: the leaf whose zero rows and columns do not count. `tensor` is zero there,
        except for rounding errors.
      rows: the axes of the input side, whose elements are rows.
      columns: the axes of the output side, whose elements are columns.
    """

    def alive(side: Axes, other: Axes) -> jax.Array:
        is_alive = jnp.any(like != 0, axis=other, keepdims=True)
        return jnp.sum(is_alive, axis=side, keepdims=True, dtype=tensor.dtype)

    count = alive(rows, columns) * alive(columns, rows)
    square = jnp.sum(jnp.square(tensor), axis=(*rows, *columns), keepdims=True)
    return tensor * jnp.sqrt(count / one_if_zero(square))


# The methods.


def exact(matrix: Matrix, X: jax.Array, power: Any) -> jax.Array:
    """``F(X)`` by the eigenvectors of ``X X^T``, in the dtype of the matrix."""
    return _times_function_of_gram(matrix, X, _eigen_power, power)


def newton_schulz(matrix: Matrix, X: jax.Array, power: Any) -> jax.Array:
    """``F(X)`` to within a few percent, by products alone, in the matrix's dtype.

    It is a weighted sum of Muon's Newton-Schulz iterates. Each iterate brings smaller
    singular values near 1 than the one before does, and the weights make ``s^p`` of
    them. Where a singular value is at least a thousandth of the norm of the spectrum,
    the error is at most 6% for ``p = 1/2`` and 17% for ``p = 0``. A smaller one is only
    multiplied by a constant.

    The steps are taken on ``X X^T``. They need fewer products than steps on ``X`` where
    ``n`` is larger than ``m``, and one sum over the devices of a mesh.
    """
    return _times_function_of_gram(matrix, X, _polynomial_power, power)


def low_rank(matrix: Matrix, X: jax.Array, power: Any, omega: jax.Array) -> jax.Array:
    """The largest singular values of ``X`` flattened, the others left as they are.

    A random projection finds the ``r`` directions ``Q`` of the largest singular values.
    They are multiplied by ``c = (s / t)^(p - 1)`` with the root mean square ``t`` of
    the others, so that the result is near ``t^(1 - p) F(X)``. :func:`exact` costs less
    at a high rank (:func:`is_exact_cheaper`).

    Args:
      matrix: the leaf's axes, and the rank ``r``.
      X: a leaf.
      power: the power ``p``.
      omega: random numbers of mean 0, of shape ``(*batch, r, *channel)``.

    Returns:
      An array like `X` in the dtype of the matrix.
    """
    axes, dtype = matrix.axes, matrix.dtype
    of_leaf = functools.partial(_product, matrix, X.dtype)
    leaf = tuple(range(len(axes.shape)))
    # Axes that the leaf does not have are named by the next numbers.
    rank_axis, new_rank_axis = len(leaf), len(leaf) + 1
    left = (*axes.batch, *axes.contracted, rank_axis)  # Q is (m, r).
    right = (*axes.batch, *axes.channel, rank_axis)  # X^T Q is (n, r).

    Y = of_leaf(X, leaf, omega, (*axes.batch, rank_axis, *axes.channel), left)
    Y = _orthonormal(matrix, Y, left, FIRST_PASSES)
    Z = of_leaf(X, leaf, Y, left, right)
    Q = of_leaf(X, leaf, Z, right, left)
    Q = _orthonormal(matrix, Q, left, SECOND_PASSES)
    B = of_leaf(X, leaf, Q, left, right)  # The transpose of Q^T X.
    square = jnp.square(matrix.tensor_norms(X.astype(dtype)))
    others = axes.contracted_size - matrix.rank
    of_gram = _on_gram(matrix, _factors_less_one, power, others)
    factors = of_gram(_gram(matrix, B, right), square)
    factor_axes = (*axes.batch, rank_axis, new_rank_axis)
    new_right = (*axes.batch, *axes.channel, new_rank_axis)
    change = _product(matrix, dtype, B, right, factors, factor_axes, new_right)
    # The difference of X and almost the same in its largest directions needs more
    # digits than bfloat16 has.
    precision = jax.lax.Precision.HIGH if X.dtype == jnp.bfloat16 else HIGHEST
    difference = _product(matrix, dtype, Q, left, change, right, leaf, precision)
    return X.astype(dtype) + difference


def is_exact_cheaper(matrix: Matrix) -> bool:
    """Whether :func:`exact` costs less than :func:`low_rank` of the matrix's rank."""
    return 2 * matrix.rank >= matrix.axes.contracted_size


def _times_function_of_gram(
    matrix: Matrix, X: jax.Array, function: Callable[..., jax.Array], power: Any
) -> jax.Array:
    """``f(X X^T) X`` for a function of Gram matrices ``(*batch, m, m)``."""
    axes, ndim = matrix.axes, len(matrix.axes.shape)
    leaf = tuple(range(ndim))
    # A Gram matrix has the contracted side twice, each time under numbers of its own.
    one, two = (
        tuple(axis + new if axis in axes.contracted else axis for axis in leaf)
        for new in (ndim, 2 * ndim)
    )
    side_one, side_two = (
        tuple(numbers[axis] for axis in axes.contracted) for numbers in (one, two)
    )
    # Each device needs the whole contracted side; all other axes stay sharded.
    sharded = (None if axis in axes.contracted else axis for axis in leaf)
    X = _sharding.reshard(X, _sharding.sharding_of_axes(matrix.sharding, sharded))
    gram = _product(
        matrix, X.dtype, X, one, X, two, (*axes.batch, *side_one, *side_two)
    )
    merged = (*matrix.batch_shape, axes.contracted_size, axes.contracted_size)
    power_of_gram = _on_gram(matrix, function, power)(gram.reshape(merged))
    factor = power_of_gram.reshape(gram.shape)
    factor_axes = (*axes.batch, *axes.contracted, *side_two)
    return _product(matrix, X.dtype, factor, factor_axes, X, two, leaf)


# Products of tensors.


def _product(
    matrix: Matrix,
    dtype: Any,
    a: jax.Array,
    a_axes: Axes,
    b: jax.Array,
    b_axes: Axes,
    out_axes: Axes,
    precision: jax.lax.Precision = HIGHEST,
) -> jax.Array:
    """:func:`~apollo_optax._matrix.product`, with sums in the matrix's dtype.

    Axes have the numbers of the leaf's axes, and are sharded as those are. Other axes
    have larger numbers, and are not sharded.
    """
    axes = (axis if axis < len(matrix.axes.shape) else None for axis in out_axes)
    return product(
        a,
        a_axes,
        b,
        b_axes,
        out_axes,
        dtype=dtype,
        sum_dtype=matrix.dtype,
        out_sharding=_sharding.sharding_of_axes(matrix.sharding, axes),
        precision=precision,
    )


def _gram(matrix: Matrix, V: jax.Array, axes: Axes) -> jax.Array:
    """``V^T V``, ``(*batch, r, r)``, of a tensor with the rank axis last."""
    rank_axis, batch = axes[-1], matrix.axes.batch
    other = (*axes[:-1], rank_axis + 1)
    gram_axes = (*batch, rank_axis, rank_axis + 1)
    return _product(matrix, matrix.dtype, V, axes, V, other, gram_axes)


def _orthonormal(matrix: Matrix, V: jax.Array, axes: Axes, passes: int) -> jax.Array:
    """An orthonormal basis of the columns of a tensor with the rank axis last.

    Each pass divides by the Cholesky factor of the Gram matrix. Where columns are
    almost dependent, one pass leaves a basis that is better conditioned, but not
    orthonormal yet.
    """
    rank_axis, batch = axes[-1], matrix.axes.batch

    def divided(_: jax.Array, V: jax.Array) -> jax.Array:
        function = _on_gram(
            matrix, _inverse_of_factor, matrix.axes.contracted_size**0.5
        )
        inverse = function(_gram(matrix, V, axes))
        new_axes = (*axes[:-1], rank_axis + 1)
        inverse_axes = (*batch, rank_axis, rank_axis + 1)
        return _product(matrix, matrix.dtype, V, axes, inverse, inverse_axes, new_axes)

    # A loop compiles faster than its passes one after the other.
    return jax.lax.fori_loop(0, passes, divided, V)


# Functions of Gram matrices, (*batch, r, r).


def _on_gram(
    matrix: Matrix, function: Callable[..., jax.Array], *constants: Any
) -> Callable[..., jax.Array]:
    """`function`, with its result sharded along the batch axes only."""
    axes = (*matrix.axes.batch, None, None)
    first = len(matrix.axes.batch)

    # XLA would shard the products of small matrices, and gather their factors.
    def whole(gram: jax.Array) -> jax.Array:
        for axis in (first, first + 1):
            gram = _sharding.keep_axis_unsharded(gram, axis, gram)
        return gram

    def of_whole(gram: jax.Array, *arrays: jax.Array) -> jax.Array:
        return whole(function(whole(gram), *arrays, *constants))

    return _sharding.with_auto_axes(
        of_whole, _sharding.sharding_of_axes(matrix.sharding, axes)
    )


def _inverse_of_factor(gram: jax.Array, root_of_length: float) -> jax.Array:
    """``C^-1`` for the Cholesky decomposition ``gram = C^T C``, up to the shift.

    `root_of_length` is the square root of the number of products in each sum of `gram`.
    """
    # The shift is relative to columns of length 1.
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    scale = jnp.where(squares > 0, jax.lax.rsqrt(squares), 1)
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    epsilon = jnp.finfo(gram.dtype).eps
    scaled = scale[..., :, None] * gram * scale[..., None, :]

    def factor(shift: float) -> jax.Array:
        return jnp.linalg.cholesky(scaled + shift * epsilon * identity)

    lower = factor(CHOLESKY_SHIFT)
    # A larger shift than needed would make the basis less accurate.
    is_indefinite = jnp.any(jnp.isnan(lower), axis=(-2, -1), keepdims=True)
    lower = jax.lax.cond(
        jnp.any(is_indefinite),
        lambda: jnp.where(
            is_indefinite, factor(LARGE_CHOLESKY_SHIFT * root_of_length), lower
        ),
        lambda: lower,
    )
    inverse = jax.lax.linalg.triangular_solve(
        lower, jnp.broadcast_to(identity, gram.shape), left_side=True, lower=True
    )
    return scale[..., :, None] * jnp.swapaxes(inverse, -2, -1)


def _eigen_power(gram: jax.Array, power: Any) -> jax.Array:
    """``gram^((p - 1) / 2)`` by its eigenvectors."""
    values, vectors = jnp.linalg.eigh(gram)
    floor = EIGENVALUE_FLOOR * jnp.finfo(gram.dtype).eps * values[..., -1:]
    values = jnp.maximum(values, floor)
    factors = one_if_zero(values) ** ((power - 1) / 2)
    scaled = vectors * factors[..., None, :]
    return jnp.matmul(scaled, jnp.swapaxes(vectors, -2, -1), precision=HIGHEST)


def _polynomial_power(gram: jax.Array, power: Any) -> jax.Array:
    """``gram^((p - 1) / 2)`` by products, for eigenvalues not far below the largest."""
    a, b, c = MUON_STEP
    weights = jnp.asarray(newton_schulz_weights(power), gram.dtype)
    dot = functools.partial(jnp.matmul, precision=HIGHEST)
    norm = jnp.sqrt(jnp.sum(jnp.square(gram), axis=(-2, -1), keepdims=True))
    norm = one_if_zero(norm)
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)

    # The iterate is K X, and A is its Gram matrix K X X^T K.
    def next_iterate(
        iterate: tuple[jax.Array, jax.Array, jax.Array], weight: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        A, K, total = iterate
        step = a * identity + b * A + c * dot(A, A)
        A, K = dot(dot(step, A), step), dot(step, K)
        return (A, K, total + weight * K), None

    # A loop compiles faster than its steps one after the other.
    K = jnp.broadcast_to(identity, gram.shape)
    first = gram / norm, K, weights[0] * K
    (_, _, total), _ = jax.lax.scan(next_iterate, first, weights[1:])
    return total * norm ** ((power - 1) / 2)


def newton_schulz_weights(power: Any) -> Any:
    """The weights of the iterates whose sum is near ``s^p``, one after the other.

    An array if `power` is one.
    """
    weights: Any = 0.0
    for coefficients in _weight_coefficients()[::-1]:
        weights = weights * power + coefficients
    return weights


@functools.cache
def _weight_coefficients() -> np.ndarray:
    """The weights as a polynomial of the power, ``(degree + 1, iterates)``.

    At each of some powers, least squares give the weights with the smallest relative
    errors over the logarithm of ``s``, from `SMALLEST_FITTED` to 1. The polynomial
    interpolates them, so that the power may be traced. It is rounded, so that all hosts
    of a mesh compile the same program.
    """
    a, b, c = MUON_STEP
    s = np.geomspace(SMALLEST_FITTED, 1, 400)
    iterates = [s]
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = iterates[-1]
        iterates.append(a * s + b * s**3 + c * s**5)
    powers = np.polynomial.chebyshev.chebpts1(WEIGHT_DEGREE + 1) / 2 + 0.5
    weights = [
        np.linalg.lstsq(
            np.stack(iterates, axis=1) / iterates[0][:, None] ** power,
            np.ones(len(s)),
            rcond=None,
        )[0]
        for power in powers
    ]
    fit = np.polynomial.polynomial.polyfit(powers, np.stack(weights), WEIGHT_DEGREE)
    return np.round(fit, 6)


def _factors_less_one(
    gram: jax.Array, square: jax.Array, power: Any, others: int
) -> jax.Array:
    """``W diag(c - 1) W^T`` for ``c = (lambda / tau^2)^((p - 1) / 2)``.

    Args:
      gram: with the eigenvalues ``lambda`` and the eigenvectors ``W``.
      square: the sum of the squares of all singular values, ``(*batch,)``.
      power: the power ``p``.
      others: how many singular values are not in `gram`; their mean square is
        ``tau^2``.
    """
    r = gram.shape[-1]
    floor = SMALLEST_LEVEL / (others + r) * square
    mean = (square - jnp.trace(gram, axis1=-2, axis2=-1)) / others
    level = jnp.maximum(mean, floor)
    level = one_if_zero(level)[..., None, None]
    identity = jnp.eye(r, dtype=gram.dtype)
    return _polynomial_power(gram / level, power) - identity
