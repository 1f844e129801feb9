"""The flops that `benchmarks.flattening_cost` counts."""

import jax
import jax.numpy as jnp
import pytest

from apollo_optax import _spectrum
from benchmarks.flattening_cost import MUON, program_flops, update_flops

M, N = 48, 80


def test_a_loop_counts_as_often_as_it_runs():
    def program(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(x @ y), x)

    x = jax.ShapeDtypeStruct((M, M), jnp.float32)
    assert program_flops(jax.make_jaxpr(program)(x).jaxpr) == 5 * 2 * M**3


def test_exact_takes_two_products_and_an_eigendecomposition():
    products = 2 * (2 * M * M * N) + 2 * M**3
    assert update_flops((M, N), "exact", None) == products + 9 * M**3


@pytest.mark.parametrize("rank", [4, 12])
def test_low_rank_takes_five_large_products(rank):
    r, passes = rank, _spectrum.FIRST_PASSES + _spectrum.SECOND_PASSES
    large = 5 * 2 * M * N * r
    # Each pass takes a Gram matrix and a product of the basis with an r x r matrix.
    basis = passes * (2 * 2 * M * r * r + r**3 / 3 + r**3)
    # X^T Q has a Gram matrix, and a product with a function of it.
    change = 2 * 2 * N * r * r
    polynomial = _spectrum.NEWTON_SCHULZ_STEPS * 4 * 2 * r**3
    total = large + basis + change + polynomial
    assert update_flops((M, N), "low_rank", r) == pytest.approx(total, rel=1e-12)


def test_muon_takes_fifteen_products():
    """Each of its five steps has X X^T = A, A A, and a polynomial of A times X."""
    assert update_flops((M, N), MUON, None) == 5 * (2 * (2 * M * M * N) + 2 * M**3)
