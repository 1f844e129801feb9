"""The site's pages hold every public name, and their Python runs."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import apollo_optax

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def python_blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def names_in_tables(page: str) -> list[str]:
    """The names in the first column of the tables of a page."""
    text = (DOCS / page).read_text()
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_each_public_name_has_a_page() -> None:
    lines = (DOCS / "api/index.md").read_text().splitlines()
    listed = [line.strip() for line in lines if re.fullmatch(r" {3}\w+", line)]
    assert sorted(listed) == sorted(apollo_optax.__all__)


def test_each_public_name_is_stable_or_experimental() -> None:
    listed = set(names_in_tables("stability.md"))
    assert listed - {"_", "examples", "benchmarks", "integrations"} == set(
        apollo_optax.__all__
    )


def test_readme_and_the_site_choose_alike() -> None:
    def choices(page: pathlib.Path) -> list[str]:
        """Returns the rows of the first table, without links."""
        rows = re.findall(r"^\| .* \|$", page.read_text(), re.MULTILINE)
        table = rows[: next(i for i, row in enumerate(rows) if "fine-tune" in row)]
        return [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", row) for row in table]

    on_site = choices(DOCS / "choosing.md")
    assert len(on_site) > 4
    assert on_site == choices(DOCS.parent / "README.md")


@pytest.mark.usefixtures("quick_compilation")
def test_the_first_example_of_the_site_runs(capsys: Any) -> None:
    (example,) = python_blocks("index.md")
    exec(compile(example, "index.md", "exec"), {})
    assert "APOLLO rank 1" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_compilation")
def test_updates_have_the_size_that_the_page_says() -> None:
    tx = apollo_optax.scale_by_apollo(rank=64)
    params = {"kernel": jnp.zeros((256, 512))}
    state, update = tx.init(params), jax.jit(tx.update)
    updates: Any = params
    for step in range(60):
        noise = jax.random.normal(jax.random.key(step), (256, 512))
        updates, state = update({"kernel": noise}, state, params)
    rms = jnp.sqrt(jnp.mean(updates["kernel"] ** 2))
    assert jnp.isclose(rms, 0.23 * (64 / 256) ** 0.5, rtol=0.05)


@pytest.mark.usefixtures("quick_compilation")
def test_a_schedule_counts_the_steps_of_a_layerwise_step() -> None:
    schedule = optax.linear_schedule(0.0, 1e-2, 10)
    numbers = {"embed": None, "layers": apollo_optax.ApolloDimensionNumbers(1, 2)}
    tx = apollo_optax.apollo(schedule, rank=2, weight_dimension_numbers=numbers)
    step = apollo_optax.layerwise_step(
        lambda params, tokens: params["embed"][tokens],
        lambda kernel, x, *_: x + jnp.tanh(x @ kernel),
        lambda params, x, _: jnp.mean((x @ params["embed"].T) ** 2),
        tx,
    )
    params: Any = {"embed": jnp.ones((5, 8)), "layers": jnp.ones((3, 8, 8))}
    state = tx.init(params)
    for _ in range(2):
        params, state, _ = jax.jit(step)(params, state, jnp.array([0, 1]))
    assert int(state[0].count) == int(state[2].count) == 2
