"""The tables of `benchmarks.finetune_quality`, with runs that only return losses."""

import itertools
import math
from pathlib import Path

import pytest

from benchmarks import finetune_quality as benchmark
from benchmarks.finetune_quality import Found, Losses
from examples.llama.config import preset
from examples.llama.optimizers import recipes
from examples.llama.run.recorder import DivergedError


def cells_of(table: str) -> list[dict[str, str]]:
    """Returns the rows of a Markdown table, each by the heads of its columns."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_passages_are_whole_paragraphs() -> None:
    paragraphs = ["a" * 60, "b" * 60, "c" * 250, "d" * 10]
    text = "\n\n".join(paragraphs)
    found = list(benchmark.passages(f"{text}\n", characters=100))
    assert found == ["\n\n".join(paragraphs[:2]), *paragraphs[2:]]


@pytest.mark.parametrize("name", benchmark.CONTENDERS)
def test_each_contender_has_five_rates_in_factors_of_two(name: str) -> None:
    trains_embeddings = "lora" not in benchmark.CONTENDERS[name]
    of_kernels, of_the_rest = zip(*benchmark.rates_of(name), strict=True)
    assert trains_embeddings or of_the_rest == (None,) * 5
    for rates in (of_kernels, of_the_rest) if trains_embeddings else (of_kernels,):
        assert len(rates) == 5
        ratios = [b / a for a, b in itertools.pairwise(rates)]
        assert ratios == pytest.approx([2] * 4, rel=1e-2)


def test_a_row_is_of_the_best_rate_on_the_new_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = benchmark.rates_of("adamw")[3][0]

    def losses_of(options, run, stop) -> Losses:
        del options, stop
        new = 3.0 + abs(math.log2(run.lr / best)) + 0.1 * run.seed
        return Losses(new, 2.0 + 10 * run.lr)

    monkeypatch.setattr(benchmark, "losses_of", losses_of)
    options = benchmark.FinetuneQualityOptions(out=tmp_path, seeds=(0, 1))
    by_rates = {
        rates: [
            losses_of(options, benchmark.run_of(options, "adamw", rates, seed), None)
            for seed in options.seeds
        ]
        for rates in benchmark.rates_of("adamw")
    }
    adamw = Found(by_rates, 10_500_000, 40_000_000)
    assert adamw.best()[0] == best
    half = {rates: [Losses(3.0, 1.0)] * 2 for rates in by_rates}
    table = benchmark.table(
        {"adamw": adamw, "racs": Found(half, 0, 0)}, Losses(4.0, 2.0)
    )
    before, of_adamw, of_racs = cells_of(table)
    mean = (math.exp(3.0) + math.exp(3.1)) / 2
    assert before["new text, ppl"] == f"{math.exp(4):.2f}"
    assert before["old text, ppl"] == f"{math.exp(2):.2f}"
    assert of_adamw["lr"] == f"{best:g}"
    assert of_adamw["new text, ppl"] == f"{mean:.2f}"
    assert of_adamw["old text, ppl"] == f"{math.exp(2 + 10 * best):.2f}"
    assert of_adamw["state, MB"] == "10.50"
    by_seed = [math.exp(3) / math.exp(loss) - 1 for loss in (3.0, 3.1)]
    assert of_racs["over adamw, by seed"] == ", ".join(f"{x:+.1%}" for x in by_seed)


def test_a_run_that_diverged_is_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(run, stop):
        raise DivergedError("the loss is 1e9 at step 3")

    monkeypatch.setattr(benchmark, "finetune", diverges)
    options = benchmark.FinetuneQualityOptions(out=tmp_path)
    run = benchmark.run_of(options, "racs", (0.1, 0.1), 0)
    losses = benchmark.losses_of(options, run, stop=None)  # pyright: ignore[reportArgumentType]
    assert losses.new == math.inf


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--contenders", "adam"], "--contenders 'adam' is unknown"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--base-steps", "-1"], "--base-steps -1 is out of range"),
        (["--seeds"], "--seeds is empty"),
        (["--seeds", "-1"], "--seeds -1 is out of range"),
        (["--contenders"], "--contenders is empty"),
    ],
)
def test_rejects_options(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main(args)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", benchmark.CONTENDERS)
def test_the_options_of_each_run_go_together(name: str, tmp_path: Path) -> None:
    options = benchmark.FinetuneQualityOptions(out=tmp_path)
    run = benchmark.run_of(options, name, benchmark.rates_of(name)[0], seed=0)
    assert recipes.with_defaults(run, preset("tiny")).lr == run.lr
