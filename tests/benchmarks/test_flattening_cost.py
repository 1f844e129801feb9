"""The flops that `benchmarks.flattening_cost` counts."""

import jax
import jax.numpy as jnp
import pytest

from apollo_optax import _spectrum
from benchmarks import flattening_cost
from benchmarks.flattening_cost import (
    MUON,
    kernel_shapes,
    program_flops,
    update_flops,
)
from examples.llama.config import PRESETS, param_count

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


@pytest.mark.parametrize("name", ["7b", "llama-3-8b", "qwen2.5-7b"])
def test_kernels_are_those_of_the_model(name):
    config = PRESETS[name]
    kernels = sum(m * n * count for (m, n), count in kernel_shapes(config).items())
    tables = 2 * config.vocab_size * config.hidden_size
    vectors = param_count(config) - tables - kernels
    assert all(m <= n for m, n in kernel_shapes(config))
    # Norms and biases have at most the size of a few rows per layer.
    assert 0 < vectors < 5 * config.num_layers * config.hidden_size


@pytest.mark.parametrize("part", ["0", "-4"])
def test_rejects_parts(part, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["flattening_cost", "--parts", part])
    with pytest.raises(SystemExit):
        flattening_cost.main()
    assert f"--parts {part} is out of range" in capsys.readouterr().err
