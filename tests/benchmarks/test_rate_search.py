import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from apollo_optax import StateBytes
from benchmarks import rate_search
from benchmarks.rate_search import (
    BY_SECOND,
    Found,
    SearchOptions,
    base_run,
    best,
    found_in,
    search,
    searched,
)
from benchmarks.rate_search_plan import SEARCH, THREE_RATES, at
from benchmarks.run_records import Records, RunRecord
from examples.llama.optimizers.embeddings import EMBEDDING_RULES
from examples.llama.optimizers.recipes import RECIPES
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError
from examples.llama.run.recorder import DivergedError
from examples.llama.run.result import RunResult
from tests.benchmarks.run_config import config_of

ROOT = Path(__file__).parents[2]


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

    search(loss, (1.0, 1.0), seeds=(0, 1, 2))
    assert asked[-3:] == [(4.0, 2.0, 0), (4.0, 2.0, 1), (4.0, 2.0, 2)]
    kernels = [each for each in asked if each[1:] == (1.0, 0)]
    assert {lr for lr, *_ in kernels} == {0.5, 1.0, 2.0, 4.0, 8.0}
    assert {emb for lr, emb, seed in asked if lr == 4.0} == {0.5, 1.0, 2.0, 4.0}


def test_a_plan_can_name_the_rates() -> None:
    asked = []

    def loss(lr: float, lr_embeddings: float, seed: int) -> float:
        if (lr, lr_embeddings, seed) not in asked:
            asked.append((lr, lr_embeddings, seed))
        return -lr - lr_embeddings

    search(loss, (0.3, 0.03), (5, 6), THREE_RATES)
    assert asked == [(0.15, 0.03, 5), (0.3, 0.03, 5), (0.6, 0.03, 5)]
    asked.clear()
    search(loss, (0.3, 0.03), (5, 6), at(2.0, lr_embeddings=(1.0, 4.0)))
    assert asked == [(0.6, 0.03, 5), (0.6, 0.12, 5)]
    asked.clear()
    search(loss, (0.3, 0.03), (5, 6, 7), at(1.0, 2.0, seeds=2))
    assert asked == [(0.3, 0.03, 5), (0.6, 0.03, 5), (0.6, 0.03, 6)]


def test_a_search_can_start_at_other_rates_than_the_defaults() -> None:
    """The kernels' rate is still searched at the default rate of embeddings."""
    asked = []

    def loss(lr: float, lr_embeddings: float, seed: int) -> float:
        asked.append((lr, lr_embeddings, seed))
        return 3 + abs(math.log2(lr / 4)) + abs(math.log2(lr_embeddings / 2))

    search(loss, (1.0, 1.0), (0,), start=(4.0, 2.0))
    assert set(asked) == {
        *((lr, 1.0, 0) for lr in (2.0, 4.0, 8.0)),
        *((4.0, lr_embeddings, 0) for lr_embeddings in (1.0, 2.0, 4.0)),
    }


def record_at(
    lr: float, lr_embeddings: float, seed: int, loss: float | None, **others: Any
) -> RunRecord:
    rates = {"lr": lr, "lr_embeddings": lr_embeddings}
    record = RunRecord(
        "8k",
        "racs",
        seed,
        rates,
        loss,
        update_rms=0.5,
        step_seconds=2.0,
        curve=[],
        corpus="text",
        made_with="here",
    )
    return record._replace(**others)


def test_runs_of_a_search_are_found_in_any_order() -> None:
    runs = [
        record_at(
            4.0, 2.0, 1, 2.8, step_seconds=1.5, update_rms=0.7, curve=[[10, 18.0]]
        ),
        record_at(2.0, 1.0, 0, 3.2),
        record_at(4.0, 2.0, 0, 2.9, curve=[[10, 20.0]], update_rms=0.3),
        record_at(8.0, 1.0, 0, None, step_seconds=None, update_rms=None),
        record_at(4.0, 1.0, 0, 3.0),
        record_at(4.0, 0.5, 0, 3.1),
        record_at(4.0, 1.0, 1, 1.0),  # A seed of a pair that is not the best.
        record_at(2.0, 0.5, 0, 1.0),  # The same.
    ]
    found = found_in(runs, lr_embeddings=1.0, seed=0)
    assert {lr: run.loss for lr, run in found.by_lr.items()} == {
        2.0: 3.2,
        4.0: 3.0,
        8.0: math.inf,
    }
    assert list(found.by_lr_embeddings) == [0.5, 1.0, 2.0]
    assert (found.lr, found.lr_embeddings) == (4.0, 2.0)
    assert found.perplexities == {0: math.exp(2.9), 1: math.exp(2.8)}
    assert found.perplexity == pytest.approx((math.exp(2.9) + math.exp(2.8)) / 2)
    assert found.update_rms == pytest.approx(0.5)
    assert found.step_seconds == 1.5
    assert found.curve == [[10, 18.0]]  # That of seed 1, which is better.


def found_at(*perplexities: float, **others: Any) -> Found:
    runs = [
        record_at(0.5, 1.0, seed, math.log(ppl), **others)
        for seed, ppl in enumerate(perplexities)
    ]
    return found_in([*runs, record_at(1.0, 1.0, 0, None)], 1.0, 0)


def test_the_table_compares_with_the_best_of_adamw_over_seeds() -> None:
    state = StateBytes(kernels=10**6, embeddings_and_head=2 * 10**6, other=0)
    found = {
        "adamw": found_at(25, update_rms=0.25),
        "adamw-clip": found_at(20),
        "muon": found_at(16),
        "racs": found_at(9, 11, update_rms=None, step_seconds=3.0),
    }
    text = rate_search.table(found, dict.fromkeys(found, state))
    head, _, adamw, clipped, _, racs = text.splitlines()
    assert adamw.startswith(
        "| adamw | 0.5 | 1 | 1 | 25.00 |  | +25.0% | +25.0% | +56.2% | 0.25 | 1.00 |"
    )
    assert "| 20.00 |  | +0.0% | +0.0% |" in clipped
    # Seed 1 has no run of AdamW or Muon, so it is not compared.
    assert racs.startswith(
        "| racs | 0.5 | 1 | 2 | 10.00 | 1.41 | -55.0% | -55.0% | -43.7% |  | 1.00 |"
    )
    assert "1: inf" in racs
    assert len({line.count("|") for line in (head, adamw, racs)}) == 1
    del found["muon"]
    assert "| -55.0% | -55.0% |  |" in rate_search.table(
        found, dict.fromkeys(found, state)
    )


def test_a_seed_that_diverged_has_a_row() -> None:
    state = StateBytes(kernels=1, embeddings_and_head=1, other=0)
    found = {"adamw": found_at(20, 20), "racs": found_at(18, math.inf)}
    *_, racs = rate_search.table(found, dict.fromkeys(found, state)).splitlines()
    assert racs.startswith("| racs | 0.5 | 1 | 2 | inf |  | +inf% | -10.0%, +inf% |")
    goals = rate_search.goals_table("8k", found, dict.fromkeys(found, state))
    assert "racs over adamw | 2 | inf | missed |" in goals
    found = {"adamw": found["racs"], "racs": found["adamw"]}
    goals = rate_search.goals_table("8k", found, dict.fromkeys(found, state))
    assert "racs over adamw | 2 | 0.000 | adamw diverged |" in goals


def test_a_single_seed_is_not_the_best_by_luck() -> None:
    found = {"adamw": found_at(20, 30), "adamw-clip": found_at(21)}
    assert rate_search.best_contender(found, rate_search.ADAMW_VARIANTS) == "adamw"


def test_a_variant_of_adamw_takes_the_place_of_adamw() -> None:
    options = SearchOptions(contenders=("muon", "adamw-clip"))
    assert list(options.plans("8k")) == ["muon", "adamw-clip"]
    options = SearchOptions(contenders=("muon",))
    assert list(options.plans("8k")) == ["adamw", "muon"]
    state = StateBytes(kernels=1, embeddings_and_head=1, other=0)
    found = {
        "adamw-clip": found_at(20, step_seconds=1.0),
        "racs": found_at(19, step_seconds=2.0),
    }
    *_, racs = rate_search.table(found, dict.fromkeys(found, state)).splitlines()
    assert racs.split(" | ")[6:11] == ["-5.0%", "-5.0%", "", "0.5", "2.00"]


def test_goals_compare_the_best_of_each_kind() -> None:
    found = {
        "adamw": found_at(21, 19),
        "adamw-clip": found_at(25),
        "racs": found_at(22.2),
        "racs-b2-0.95": found_at(22.0),
        "apollo-zero": found_at(19, 17),
        "apollo-zero-b2-0.95": found_at(20, 18),
        "apollo-zero-emb-scale": found_at(10),
        "apollo-zero-emb-adafactor-b2-0.95": found_at(9.5),
    }
    no_kernels = StateBytes(kernels=0, embeddings_and_head=1, other=0)
    state = {name: no_kernels._replace(kernels=1) for name in found}
    state |= {name: no_kernels for name in found if name.startswith("apollo-zero")}
    _, _, *rows = rate_search.goals_table("8k", found, state).splitlines()
    cells = [tuple(row.strip("| ").split(" | ")) for row in rows]
    # Adam on embeddings is what the stateless rules are compared with.
    assert cells[0][1:] == ("0.92", "apollo-zero over adamw", "2", "0.900", "met")
    assert cells[1][1:] == ("1.03", "", "", "", "not run")
    # Only the first seed of AdamW is compared with the only one of RACS.
    assert cells[2][1:] == ("1.02", "racs-b2-0.95 over adamw", "1", "1.048", "missed")
    assert cells[3][2:] == (
        "apollo-zero-emb-adafactor-b2-0.95 over apollo-zero",
        "1",
        "0.500",
        "met",
    )
    assert rate_search.goals_table("long", found, state) == ""


def test_the_summary_has_the_best_settings_of_each_part() -> None:
    found = {
        "1k": {
            "adamw": found_at(20),
            "adamw-b2-0.95": found_at(10),
            "racs": found_at(11),
            "racs-relative": found_at(9),
        },
        "8k": {"adamw": found_at(20), "racs-b2-0.95-relative": found_at(19)},
    }
    assert rate_search.summary(found).splitlines()[2:] == [
        "| adamw | +0.0% (1) | +0.0% (1) |",
        "| racs | +10.0% (1) |  |",
        "| racs, relative | -10.0% (1) | -5.0% (1) |",
    ]


def test_relative_updates_are_no_setting_of_adamw_or_muon() -> None:
    """A rule without state may have them in its goals, though."""
    found = {
        "adamw": found_at(20),
        "adamw-relative": found_at(15),
        "muon": found_at(18),
        "muon-relative": found_at(16),
        "apollo-zero-relative": found_at(18),
        "apollo-zero-emb-adafactor-relative": found_at(10),
    }
    state = {
        name: StateBytes(
            kernels=not name.startswith("apollo-zero"), embeddings_and_head=1, other=0
        )
        for name in found
    }
    *_, last = rate_search.table(found, state).splitlines()
    assert last.split(" | ")[6:9] == ["-50.0%", "-50.0%", "-44.4%"]
    over_adamw, over_muon, *_ = rate_search.goals_table(
        "8k", found, state
    ).splitlines()[2:]
    assert "apollo-zero-relative over adamw | 1 | 0.900 | met" in over_adamw
    assert "apollo-zero-relative over muon | 1 | 1.000 | met" in over_muon


@pytest.mark.parametrize("name", rate_search.CONTENDERS)
def test_contenders_are_runs_of_pretrain(name: str, tmp_path: Path) -> None:
    options = SearchOptions(out=tmp_path)
    run = base_run(options, "1k", name)
    assert run.lr is not None
    assert run.lr_embeddings is not None
    for field, value in rate_search.CONTENDERS[name].items():
        assert getattr(run, field) == value


def test_finished_runs_are_found_where_earlier_searches_left_them(
    tmp_path: Path,
) -> None:
    run = base_run(SearchOptions(out=tmp_path), "1k", "adamw")
    assert (run.lr, run.lr_embeddings) == (0.002, 0.03)
    assert (run.b2, run.clip_norm, run.data) == (None, None, "stdlib")
    at_rates = rate_search.run_at(run, "adamw", 0.002, 0.03, 0)
    assert at_rates.out == tmp_path / "1k" / "adamw-0.002-0.03-seed0"
    assert at_rates == dataclasses.replace(run, out=at_rates.out)


def test_each_part_has_its_text_and_contenders(tmp_path: Path) -> None:
    options = SearchOptions(out=tmp_path)
    docs, on_8k = (base_run(options, part, "muon") for part in ("docs", "8k"))
    assert docs.data == "package-docs"
    assert dataclasses.replace(docs, data="stdlib", out=on_8k.out) == on_8k
    assert base_run(SearchOptions(data="python"), "docs", "muon").data == "python"
    assert options.plans("8k")["muon-b2-0.95"] == SEARCH
    assert options.plans("8k")["lion"] == THREE_RATES
    assert "apollo-mini" not in options.plans("docs")
    assert options.tabulated == tuple(rate_search.CONTENDERS)
    given = SearchOptions(contenders=("swan",), three_rates=("sgd",))
    expected = {"adamw": SEARCH, "swan": SEARCH, "sgd": THREE_RATES}
    assert given.plans("6m") == expected
    assert given.tabulated == tuple(expected)
    given = SearchOptions(three_rates=("adamw", "muon"))
    assert given.plans("6m") == {"adamw": THREE_RATES, "muon": THREE_RATES}


@pytest.mark.parametrize("part", rate_search.PARTS)
def test_each_plan_has_adamw_and_known_contenders(part: str) -> None:
    _, plans, drawn = rate_search.PARTS[part]
    assert rate_search.CONTENDERS.keys() >= plans.keys() >= set(drawn)
    assert any(name in rate_search.ADAMW_VARIANTS for name in plans)


@pytest.mark.parametrize("part", ["1k", "8k"])
def test_short_parts_have_all_optimizers_with_a_search_or_three_rates(
    part: str,
) -> None:
    plans = rate_search.PARTS[part].plans
    for name in RECIPES:
        rates = [
            math.inf if plan.lr is None else len(plan.lr)
            for variant, plan in plans.items()
            if rate_search.CONTENDERS[variant]["optimizer"] == name
        ]
        # It rounds the momentum of another one, so it runs at the best rate of that.
        least = 1 if name == "apollo-zero-momentum-int8" else 3
        assert max(rates, default=0) >= least, name
    # The documentation recommends these, or compares the others with them.
    assert {
        rate_search.CONTENDERS[variant]["optimizer"]
        for variant, plan in plans.items()
        if plan == SEARCH
    } >= {
        "adamw",
        "muon",
        "apollo-mini",
        "apollo-zero",
        "apollo-zero-whitening",
        "apollo-zero-momentum",
    }


def test_a_search_trains_and_goes_on_from_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = stub_pretrain(monkeypatch)
    options = SearchOptions(out=tmp_path, seeds=(0,))
    rate_search.run_search(options, "8k", "racs", SEARCH)
    assert {(run.optimizer, run.batch, run.steps) for run in runs} == {
        ("racs", 64, 300)
    }
    assert all(run.resume == "auto" for run in runs)
    # No run is asked for twice.
    first = [(run.lr, run.lr_embeddings, run.seed) for run in runs]
    assert len(set(first)) == len({run.out for run in runs}) == len(runs)
    runs.clear()

    # A machine that has the file of results repeats none of its runs.
    elsewhere = SearchOptions(
        out=tmp_path / "elsewhere", results=tmp_path / "results.jsonl", seeds=(0, 1)
    )
    rate_search.run_search(elsewhere, "8k", "racs", SEARCH)
    assert [run.seed for run in runs] == [1]
    base = base_run(elsewhere, "8k", "racs")
    records = rate_search.results_of(elsewhere).of("8k", "racs", base)
    found = found_in(records, 0.03, 0)
    assert found.perplexities == pytest.approx({0: math.exp(4), 1: math.exp(5)})


def test_a_run_that_diverged_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = []

    def pretrain(run: RunOptions, stop: Any, *, measure_updates: bool) -> RunResult:
        del stop, measure_updates
        write_run(run, [{"step": 1, "tokens": 8, "tokens_per_s": 4.0}])
        diverged.append(run)
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(rate_search, "pretrain", pretrain)
    options = SearchOptions(out=tmp_path, seeds=(0,))
    for _ in range(2):
        rate_search.run_search(options, "1k", "lion", THREE_RATES)
    assert len(diverged) == 3
    (run, *_) = Records(tmp_path / "results.jsonl").of(
        "1k", "lion", base_run(options, "1k", "lion")
    )
    assert run.loss == math.inf
    assert (run.val_loss, run.update_rms, run.step_seconds) == (None, None, 2.0)


def stub_pretrain(monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    """Replaces training by metrics with round numbers; returns the runs asked for.

    AdamW's steps take 2 seconds and those of others 1. The loss is lowest at rates of
    0.001 and 0.03, where it is 4 more than the seed. The update of the kernels is 1
    more than the seed.
    """
    runs: list[RunOptions] = []

    def pretrain(run: RunOptions, stop: Any, *, measure_updates: bool) -> RunResult:
        del stop
        assert measure_updates
        assert run.lr is not None
        assert run.lr_embeddings is not None
        runs.append(run)
        tokens, loss = run.batch * run.seq, 4.0 + run.seed
        loss += abs(math.log(run.lr / 0.001)) + abs(math.log(run.lr_embeddings / 0.03))
        seconds = 2 if run.optimizer == "adamw" else 1
        rows = [
            {"step": step, "tokens": step * tokens, "tokens_per_s": tokens / seconds}
            for step in range(1, run.steps + 1)
        ]
        rows[0]["tokens_per_s"] = 1.0  # It compiles.
        for row in rows[99::100]:
            # The first half of a run is left out of the mean.
            size = 1.0 + run.seed if row["step"] > run.steps / 2 else 1e6
            row |= {"val_ppl": math.exp(loss), "update_rms_over_lr": size}
        write_run(run, rows)
        return RunResult(run, loss, tokens / seconds)

    monkeypatch.setattr(rate_search, "pretrain", pretrain)
    return runs


def write_run(run: RunOptions, rows: list[dict[str, Any]]) -> None:
    """Writes the files of a run that a search reads."""
    run.out.mkdir(parents=True, exist_ok=True)
    config = {"optimizer": run.optimizer} | config_of(run.data)
    (run.out / "config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run.out / "metrics.jsonl").write_text(lines)


def search_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs searches here, where functions can be replaced."""

    def run_here(options: SearchOptions, part: str) -> None:
        for name, plan in options.plans(part).items():
            rate_search.run_search(options, part, name, plan)

    monkeypatch.setattr(rate_search, "run_searches", run_here)


def test_a_summary_of_several_parts_follows_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_pretrain(monkeypatch)
    search_in_this_process(monkeypatch)
    args = ["--contenders", "racs", "--seeds", "0", "1", "--out", str(tmp_path)]
    rate_search.main(["--parts", "8k", "docs", *args])
    tables, summary = capsys.readouterr().out.split(rate_search.SUMMARY_NOTE)
    assert tables.index("8k: tiny") < tables.index("docs: tiny")
    assert summary.splitlines()[2:] == [
        "| optimizer | 8k | docs |",
        "| --- | ---: | ---: |",
        "| adamw | +0.0% (2) | +0.0% (2) |",
        "| racs | +0.0% (2) | +0.0% (2) |",
    ]


def test_a_part_ends_with_a_table_and_two_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = stub_pretrain(monkeypatch)
    search_in_this_process(monkeypatch)
    curves: dict[str, Any] = {}
    plot = rate_search.plot_perplexities

    def plotted(points: Any, xlabel: str, path: Path) -> None:
        curves[path.name] = points
        plot(points, xlabel, path)

    monkeypatch.setattr(rate_search, "plot_perplexities", plotted)
    args = ["--contenders", "racs", "--three-rates", "lion", "--seeds", "0", "1"]
    rate_search.main(["--parts", "docs", "--out", str(tmp_path), *args])
    output = capsys.readouterr().out
    assert "docs: tiny, 300 steps of 8,192 tokens of --data package-docs" in output
    rows = {row.split(" | ")[0]: row.split(" | ") for row in output.split("\n| ")}
    assert rows["racs"][6:11] == ["+0.0%", "+0.0%, +0.0%", "", "1.5", "0.50"]
    assert rows["lion"][3] == "1"
    assert rows["lion"][9:11] == ["1", "0.50"]
    assert float(rows["adamw"][11]) < float(rows["adamw"][12])  # The state.
    assert {run.data for run in runs} == {"package-docs"}
    losses = [math.exp(4.0)] * 3  # The best of the seeds.
    by_step, by_second = curves["perplexity-by-step.png"], curves[BY_SECOND]
    steps = (100, 200, 300)
    assert by_step["adamw"] == list(map(list, zip(steps, losses, strict=True)))
    assert by_second["adamw"] == list(zip((200, 400, 600), losses, strict=True))
    assert list(by_step) == list(by_second) == ["adamw", "racs", "lion"]
    for name in curves:
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")

    # The same from the file of results alone, without contenders that were not run.
    runs.clear()
    results = ["--results", str(tmp_path / "results.jsonl"), "--finished-only"]
    out = ["--parts", "docs", "--out", str(tmp_path / "elsewhere"), *results]
    rate_search.main([*out, *args, "--contenders", "racs", "muon"])
    again = capsys.readouterr().out
    assert again.replace("/elsewhere", "") == output
    assert not runs
    assert rate_search.SUMMARY_NOTE not in output  # There is one part.


@pytest.fixture(scope="module")
def published() -> SearchOptions:
    """The options of the command that printed the tables."""
    return SearchOptions(
        results=ROOT / "docs/figures/rate-search.jsonl", finished_only=True
    )


@pytest.mark.parametrize("part", ["1k", "8k", "6m", "long", "docs"])
def test_the_documentation_has_the_tables_of_the_published_runs(
    part: str, published: SearchOptions
) -> None:
    found = rate_search.found_by_all(published, part)
    state = {name: rate_search.state_of(published, part, name) for name in found}
    lines = rate_search.table(found, state).splitlines()
    lines += rate_search.goals_table(part, found, state).splitlines()
    assert len(lines) >= 2 + len(found)  # The head, its line, and the rows.
    documented = (ROOT / "docs/results.md").read_text().splitlines()
    assert [line for line in lines if line not in documented] == []


def test_the_documentation_has_the_summary_of_the_published_runs(
    published: SearchOptions,
) -> None:
    parts = rate_search.PARTS
    found = {part: rate_search.found_by_all(published, part) for part in parts}
    assert rate_search.summary(found) in (ROOT / "docs/results.md").read_text()


@pytest.mark.parametrize("part", rate_search.PARTS)
def test_all_runs_of_the_plans_are_published(
    part: str, published: SearchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(part: str, contender: str, run: RunOptions, stop: Any) -> RunRecord:
        del stop
        pytest.fail(f"{part}: {contender} at {run.lr}, {run.lr_embeddings}, {run.seed}")

    monkeypatch.setattr(rate_search, "trained", trained)
    for name, plan in published.plans(part).items():
        rate_search.run_search(published, part, name, plan)


@pytest.mark.parametrize("rule", ["adafactor", "racs", "scale"])
def test_the_default_rates_of_embeddings_are_the_best_of_the_published_runs(
    rule: str, published: SearchOptions
) -> None:
    found = rate_search.found_by_all(published, "1k")[f"apollo-zero-emb-{rule}"]
    assert found.lr_embeddings == EMBEDDING_RULES[rule].lr
    # The rates on both sides are worse.
    assert min(found.by_lr_embeddings) < found.lr_embeddings
    assert max(found.by_lr_embeddings) > found.lr_embeddings


def test_the_default_rate_of_the_momentum_is_the_better_of_the_published_ones(
    published: SearchOptions,
) -> None:
    found = rate_search.found_by_all(published, "1k")
    momentum = found["apollo-zero-emb-adafactor-momentum"]
    assert len(momentum.by_lr_embeddings) > 1
    assert momentum.lr_embeddings == EMBEDDING_RULES["adafactor-momentum"].lr


def test_a_table_needs_runs_of_adamw(tmp_path: Path) -> None:
    options = SearchOptions(out=tmp_path, finished_only=True)
    with pytest.raises(UsageError, match=r"results\.jsonl does not exist"):
        rate_search.found_by_all(options, "6m")
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(
        UsageError, match=r"results\.jsonl has no run of AdamW in .* 6m"
    ):
        rate_search.found_by_all(options, "6m")


@pytest.mark.slow
def test_contenders_are_searched_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are in the file of results, so the processes need not train."""
    stub_pretrain(monkeypatch)
    options = SearchOptions(out=tmp_path, contenders=("racs",), seeds=(0,))
    for name in ("adamw", "racs"):
        rate_search.run_search(options, "8k", name, SEARCH)
    before = (tmp_path / "results.jsonl").read_text()
    rate_search.run_searches(options, "8k")
    assert (tmp_path / "results.jsonl").read_text() == before
    assert rate_search.found_by_all(options, "8k").keys() == {"adamw", "racs"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("2k",)}, "--parts"),
        ({"contenders": ("shampoo",)}, "--contenders"),
        ({"three_rates": ("shampoo",)}, "--three-rates"),
        ({"seeds": ()}, "--seeds"),
        ({"processes": 0}, "--processes 0"),
        (
            {"contenders": ("adamw", "swan"), "three_rates": ("swan",)},
            "swan is in --contenders and in --three-rates",
        ),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchOptions(**options)
