import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rate_search
from benchmarks.rate_search import Found, best, search, searched
from examples.llama.run.errors import UsageError


def valley(lowest: float, diverges_from: float = math.inf) -> Any:
    """A loss that is lowest at one rate, and the rates that it was asked for."""
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        if rate >= diverges_from:
            return math.inf
        return 3.0 + math.log(rate / lowest) ** 2

    return loss, asked


@pytest.mark.parametrize("lowest", [1e-3, 2e-3, 4e-3, 1.6e-2, 1.25e-4])
def test_the_rates_on_both_sides_of_the_best_are_worse(lowest: float) -> None:
    loss, asked = valley(lowest)
    losses = searched(loss, 2e-3)
    assert best(losses) == lowest
    assert {lowest / 2, 2 * lowest} <= losses.keys()
    assert list(losses) == sorted(losses)
    assert len(asked) == len(set(asked)) == len(losses)  # None is run twice.


def test_a_rate_that_diverges_counts_as_worse() -> None:
    loss, _ = valley(1e-2, diverges_from=4e-3)
    losses = searched(loss, 2e-3)
    assert best(losses) == 2e-3
    assert losses[4e-3] == math.inf


def test_where_all_rates_diverge_lower_ones_are_tried() -> None:
    loss, _ = valley(1e-4, diverges_from=1e-3)
    losses = searched(loss, 8e-3)
    assert best(losses) == 1.25e-4
    assert losses[6.25e-5] > losses[1.25e-4]


def test_a_search_that_finds_no_worse_rate_ends_at_the_edge() -> None:
    loss, asked = valley(1e9)
    losses = searched(loss, 1.0, most=5)
    assert len(asked) == 5
    assert best(losses) == max(losses)


def test_embeddings_are_searched_at_the_best_rate_of_the_kernels() -> None:
    asked = []

    def loss(lr: float, lr_embeddings: float, seed: int) -> float:
        asked.append((lr, lr_embeddings, seed))
        return 3 + abs(math.log2(lr / 4)) + abs(math.log2(lr_embeddings / 2)) + seed

    found = search(loss, (1.0, 1.0), seeds=(0, 1, 2))
    assert (found.lr, found.lr_embeddings) == (4.0, 2.0)
    assert list(found.by_seed.values()) == [3.0, 4.0, 5.0]
    kernels = [each for each in asked if each[1:] == (1.0, 0)]
    assert {lr for lr, *_ in kernels} == {0.5, 1.0, 2.0, 4.0, 8.0}
    assert {emb for lr, emb, seed in asked if lr == 4.0} == {0.5, 1.0, 2.0, 4.0}


def test_the_table_compares_with_adamw_over_seeds() -> None:
    adamw = Found({1.0: math.log(20)}, {1.0: math.log(20)}, {0: math.log(20)})
    other = Found(
        {1.0: math.inf, 0.5: math.log(9)},
        {1.0: math.log(9)},
        {0: math.log(9), 1: math.log(11)},
    )
    text = rate_search.table(
        {"adamw": adamw, "racs": other}, {"adamw": 8, "racs": 10**6}
    )
    row = text.splitlines()[-1]
    assert row.startswith("| racs | 0.5 | 1 | 10.00 | 1.41 | -50.0% | 1.00 |")
    assert "1: inf" in row


def test_a_search_trains_and_goes_on_from_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    class Result:
        val_loss = 4.0

    def pretrain(run: Any, stop: Any) -> Any:
        del stop
        runs.append(run)
        return Result

    monkeypatch.setattr(rate_search, "pretrain", pretrain)
    options = rate_search.SearchOptions(out=tmp_path, seeds=(0, 1))
    found = rate_search.found_by(options, "8k", "racs")
    assert found.by_seed == {0: 4.0, 1: 4.0}
    assert {(run.optimizer, run.batch, run.steps) for run in runs} == {
        ("racs", 64, 300)
    }
    assert all(run.resume == "auto" for run in runs)
    assert len({(run.lr, run.lr_embeddings, run.seed) for run in runs}) == len(
        {run.out for run in runs}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("2k",)}, "--parts"),
        ({"optimizers": ("shampoo",)}, "--optimizers"),
        ({"seeds": ()}, "--seeds"),
        ({"processes": 0}, "--processes 0"),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rate_search.SearchOptions(**options)
