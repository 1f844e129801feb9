"""The snippets of docs/extending.md run and give the results that the page states."""

import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_optax import (
    ApolloDimensionNumbers,
    _matrix,
    _projection,
    _state,
    scale_by_apollo,
    state_owners,
    state_sharding,
    tabulate,
)
from tests.helpers import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run(text):
    """The names that a snippet defines."""
    (code,) = (each for each in snippets("python") if text in each)
    names = {"__name__": "snippet"}
    exec(compile(code, "extending.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def tables():
    """Restores the tables that snippets add to."""
    tables = (_matrix.SCALE_TYPES, _projection.NAMED, _state.STATES)
    restored: Any = [(table, dict(table)) for table in tables]
    yield
    for table, before in restored:
        table.clear()
        table.update(before)


def test_every_snippet_is_run_here():
    assert len(snippets("python")) == 7
    assert len(snippets("diff")) == 1


def test_a_scaling_rule_is_one_row():
    """A factor per head, and a limiter that knows the norm of what it limits."""
    tx, gradient = run('SCALE_TYPES["head"]')["tx"], normal(0, (8, 3, 5))
    updates, state = tx.update(gradient, tx.init(gradient))
    factors = np.asarray(updates / gradient)
    np.testing.assert_allclose(factors, factors[:1, :, :1] + 0 * factors, rtol=1e-4)
    assert len(np.unique(np.round(factors[0, :, 0], 4))) == 3
    # The limiter remembers the norm before the bias correction of the first step.
    correction = np.sqrt(1 - 0.999) / (1 - 0.9)
    norm = jnp.linalg.norm(updates) / correction
    np.testing.assert_allclose(state.norm, norm, rtol=1e-5)
    # A notebook may define the rule again.
    _matrix.SCALE_TYPES["head"] = lambda channel_axes: ()
    numbers = ApolloDimensionNumbers(0, (1, 2))
    again = scale_by_apollo(4, scale_type="head", weight_dimension_numbers=numbers)
    updates, _ = again.update(gradient, again.init(gradient))
    assert len(np.unique(np.round(np.asarray(updates / gradient)[0].ravel(), 4))) == 15


def test_a_limiter_is_a_chain():
    tx = run("norm_growth_limit=None")["tx"]
    params = {"kernel": normal(0, (8, 16))}
    state = tx.init(params)
    assert state[0].norm["kernel"] == 0
    updates, state = jax.jit(tx.update)(params, state, params)
    rms = jnp.sqrt(jnp.mean(updates["kernel"] ** 2))
    np.testing.assert_allclose(rms, 0.5 * 0.01, rtol=1e-5)
    assert state[0].norm["kernel"] == 0


def test_momentum_is_a_chain():
    tx = run("optax.trace(0.9)")["tx"]
    first, second = ({"kernel": normal(seed, (8, 16))} for seed in (0, 1))
    _, state = tx.update(first, tx.init(first))
    updates, _ = tx.update(second, state)
    alone = scale_by_apollo(rank=4)
    trace = {"kernel": 0.9 * first["kernel"] + second["kernel"]}
    _, state = alone.update(first, alone.init(first))
    expected, _ = alone.update(trace, state)
    np.testing.assert_allclose(updates["kernel"], -0.01 * expected["kernel"], rtol=1e-4)


def apply_diff(text, folder):
    """Applies a diff whose hunks have names for line numbers."""
    for part in re.split(r"^--- .*\n\+\+\+ b/", text, flags=re.MULTILINE)[1:]:
        name, hunks = part.split("\n", 1)
        file = folder / name
        content = file.read_text()
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert content.count(old) == 1, (name, old)
            content = content.replace(old, new)
        file.write_text(content)


TRACE = """
    import jax, jax.numpy as jnp
    import apollo_optax
    from jax.sharding import NamedSharding, PartitionSpec as P

    jax.config.update("jax_num_cpu_devices", 2)
    numbers = apollo_optax.ApolloDimensionNumbers(-2, -1)
    tx = apollo_optax.scale_by_apollo(
        2, norm_growth_limit=None, weight_dimension_numbers=numbers
    )
    keys = jax.random.split(jax.random.key(0), 2)
    first, second = ({"w": jax.random.normal(key, (3, 8, 12))} for key in keys)
    state = tx.init(first)
    assert state.trace["w"].shape == (3, 8, 12)
    _, state = tx.update(first, state)
    updates, state = tx.update(second, state)
    trace = 0.9 * first["w"] + second["w"]
    assert jnp.allclose(state.trace["w"], trace, atol=1e-6)
    ratio = updates["w"] / trace
    assert jnp.allclose(ratio, ratio[:, :1], rtol=1e-3), "one factor per channel"

    mesh = jax.make_mesh((2,), ("x",))
    place = NamedSharding(mesh, P(None, "x"))
    params = {"w": jax.ShapeDtypeStruct((3, 8, 12), jnp.float32, sharding=place)}
    shardings = apollo_optax.state_sharding(
        jax.eval_shape(tx.init, params), params, weight_dimension_numbers=numbers
    )
    assert shardings.trace["w"] == place
    table = apollo_optax.tabulate(tx, params, weight_dimension_numbers=numbers)
    assert "(3, 8, 12) x 1" in table
    print("done")
"""


def test_momentum_as_a_field_is_one_row_and_the_step(tmp_path):
    """The diff, applied to a copy of the package."""
    shutil.copytree(ROOT / "apollo_optax", tmp_path / "apollo_optax")
    (diff,) = snippets("diff")
    apply_diff(diff, tmp_path)
    added = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(added) <= 16
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRACE)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


@pytest.mark.parametrize("text", ["def sparse(", "class Sparse("])
def test_a_drawn_projection_is_a_callable_or_a_class(text):
    tx, gradient = run(text)["tx"], normal(0, (8, 16))
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert state.projection is None
    assert jnp.isfinite(updates).all()
    # Both draw the same projections from the same keys.
    other = scale_by_apollo(4, projection=run("def sparse(")["sparse"])
    expected, _ = other.update(gradient, other.init(gradient))
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_a_stored_projection_is_a_class():
    tx, gradient = run("class LargestRows(")["tx"], normal(0, (2, 8, 16))
    params = {"kernel": gradient[0]}
    _, state = jax.jit(tx.update)(params, tx.init(params))
    norms = np.linalg.norm(gradient[0], axis=1)
    chosen = np.asarray(state.projection["kernel"]).argmax(1)
    np.testing.assert_array_equal(chosen, np.argsort(-norms)[:4])
    # Between refreshes it stays, even if the gradient changes.
    _, later = jax.jit(tx.update)({"kernel": gradient[1]}, state)
    chex.assert_trees_all_equal(later.projection, state.projection)
    assert "(4, 8) x 1" in tabulate(tx, params)
    mesh = jax.make_mesh((8,), ("x",))
    place = jax.NamedSharding(mesh, jax.P("x"))
    on_mesh = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)}
    shardings = state_sharding(jax.eval_shape(tx.init, on_mesh), on_mesh)
    assert tuple(shardings.projection["kernel"].spec) == (None, "x")


def test_an_algorithm_is_one_file():
    make = run("class NormalizedRowsState(")["scale_by_normalized_rows"]
    numbers = {"stack": ApolloDimensionNumbers(2, 1), "bias": None}
    tx = make(numbers)
    params = {"stack": normal(0, (3, 16, 8)), "bias": normal(0, (16,))}
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    rows = np.sqrt(np.mean(np.square(updates["stack"]), axis=1))
    np.testing.assert_allclose(rows, np.ones((3, 8)), rtol=1e-5)
    assert len(jax.tree.leaves(state)) == 3
    assert state_owners(state, params).mu["bias"] == "bias"
    mesh = jax.make_mesh((8,), ("x",))
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P(None)))
    shardings = state_sharding(state, params, weight_dimension_numbers=numbers)
    assert shardings.mu["bias"].is_fully_replicated
    # Optax's Adam has the same names.
    adam = optax.adam(0.1).init(params)
    shardings = state_sharding(adam, params, weight_dimension_numbers=numbers)
    assert shardings[0].mu["stack"].is_fully_replicated
    # A state without such leaves is a count, but its class has a name.
    assert "normalized rows" in tabulate(make(), {"kernel": normal(0, (8, 16))})
