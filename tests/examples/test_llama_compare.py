import io
import json
import math
import os
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from apollo_optax import StateBytes
from examples.llama import compare
from examples.llama.config import LlamaConfig
from examples.llama.optimizers import recipes
from examples.llama.options import RunOptions
from examples.llama.run import checkpoint
from examples.llama.run import log as run_log
from examples.llama.run.result import RunResult

SHORT = ["--steps", "3", "--batch", "2", "--seq", "16", "--eval-every", "2"]
HEAD = "optimizer lr lr emb val ppl ± seeds kernels emb+head rest tokens/s"


def table_rows(output: str) -> list[list[str]]:
    lines = output.splitlines()
    (head,) = (
        number for number, line in enumerate(lines) if line.split() == HEAD.split()
    )
    rows = (line.split() for line in lines[head + 2 :])
    return [row for row in rows if row and row[0] in recipes.RECIPES]


def exits_with_message(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        compare.main(args)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_compare_prints_a_table(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(
        ["--out", str(out), "--lr", "0.01", "--lr-embeddings", "0.003", *SHORT]
    )
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = table_rows(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [
        ["adamw", "0.01", "0.003"],
        ["apollo-mini", "0.01", "0.003"],
        ["apollo-zero", "0.01", "0.003"],
    ]
    losses = []
    for row in rows:
        metrics = run_log.read_metrics(out / f"{row[0]}-0.01-0.003-seed0")
        losses.append([line["loss"] for line in metrics])
        assert row[3] == f"{min(m['val_ppl'] for m in metrics[1:]):.2f}*"
        assert row[4] == "1"  # One seed, so no spread.
        assert row[7:9] == [
            "98.3",
            "kB",
        ]  # Two float32 moments of embeddings and head.
    assert rows[0][5:7] == ["52.2", "kB"]
    # All runs have the same batches, and the learning rate of the first step is 0.
    assert losses[0][:2] == pytest.approx(losses[1][:2], abs=1e-6)
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize(
    ("names", "seeds"),
    [
        (["adamw"], ["7"]),
        pytest.param(["adamw", "sgd"], ["5", "7"], marks=pytest.mark.slow),
    ],
    ids=["one", "two"],
)
def test_the_best_rates_are_run_again_with_the_other_seeds(
    names: list[str], seeds: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--out", str(out), "--optimizers", *names, "--lr-factors", "0.1", "1"]
    args += [*SHORT, "--more-seeds", *seeds, "--checkpoint-every", "2"]
    compare.main(args)
    output = capsys.readouterr().out
    rows = table_rows(output)
    assert [row[0] for row in rows] == [name for name in names for _ in range(2)]
    default = recipes.RECIPES["adamw"].lr
    assert [float(row[1]) for row in rows[:2]] == [default / 10, default]
    results = [
        json.loads(line) for line in (out / compare.RESULTS).read_text().splitlines()
    ]
    assert len(results) == len(names) * (2 + len(seeds))
    for name in names:
        of_name = [row for row in rows if row[0] == name]
        (best,) = (row for row in of_name if row[3].endswith("*"))
        values = [
            r["val_ppl"]
            for r in results
            if r["optimizer"] == name and r["lr"] == float(best[1])
        ]
        firsts = [
            r["val_ppl"] for r in results if r["optimizer"] == name and r["seed"] == 0
        ]
        assert values[0] == min(firsts)
        assert best[3:6] == [
            f"{statistics.mean(values):.2f}*",
            f"{statistics.stdev(values):.2f}",
            str(1 + len(seeds)),
        ]
        folder = f"{name}-{float(best[1]):g}-{float(best[2]):g}-seed7"
        assert json.loads((out / folder / "config.json").read_text())["seed"] == 7
    # No run is repeated, an interrupted run continues, and the table stays the same.
    cut = out / f"{names[-1]}-{recipes.RECIPES[names[-1]].lr:g}-0.03-seed0"
    shutil.rmtree(cut / "checkpoints" / "3")
    metrics = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(metrics[:2]))

    def when_written() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for path in out.glob("*/checkpoints/3/_CHECKPOINT_METADATA")
        }

    before = when_written()
    assert len(before) == len(results) - 1
    compare.main([*args, "--resume", "auto"])
    after = when_written()
    assert after.keys() - before.keys() == {
        cut / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    }
    assert after | before == after
    assert [row[:6] for row in table_rows(capsys.readouterr().out)] == [
        row[:6] for row in rows
    ]


def test_compare_runs_every_optimizer_at_every_pair_of_rates(
    tmp_path: Path, small: LlamaConfig
) -> None:
    def folders(**options: Any) -> list[str]:
        grid = compare.grid(compare.CompareOptions(out=tmp_path, **options), small)
        return [run.out.name for run in grid]

    assert folders(
        optimizers=("adamw", "apollo"), lr=(0.1, 0.2), lr_embeddings=(0.3, 0.4)
    ) == [
        f"{name}-{rates}-seed0"
        for name in ("adamw", "apollo")
        for rates in ("0.1-0.3", "0.1-0.4", "0.2-0.3", "0.2-0.4")
    ]
    recipe = recipes.RECIPES["muon"]
    assert folders(optimizers=("muon",), seed=4) == [
        f"muon-{recipe.lr:g}-{recipe.lr_embeddings:g}-seed4"
    ]
    halves = folders(optimizers=("muon",), lr_factors=(0.5, 2), lr_embeddings=(0.1,))
    assert halves == [
        f"muon-{recipe.lr / 2:g}-0.1-seed0",
        f"muon-{recipe.lr * 2:g}-0.1-seed0",
    ]


def test_compare_continues_after_a_diverged_run(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "--optimizers",
        "adamw",
        "--lr-embeddings",
        "30",
        "0.01",
        "--more-seeds",
        "1",
    ]
    compare.main(["--out", str(out), *args, *SHORT])
    captured = capsys.readouterr()
    assert "adamw lr=0.002,30 seed=0: the " in captured.err
    rows = table_rows(captured.out)
    assert rows[0][3:] == ["diverged"]
    assert rows[1][5] == "2"
    assert (out / "curves.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--optimizers", "adamw", "apolo"],
            "--optimizers 'apolo' is unknown; choose one of: apollo, ",
        ),
        (
            ["--optimizers", "adamw", "muon", "--rank", "4"],
            "--rank 4 means nothing to adamw, muon; leave it out",
        ),
        (
            ["--lr", "0.1", "0.10"],
            "adamw with the learning rates 0.1 and 0.03 is given twice",
        ),
        (["--optimizers", "adamw", "adamw"], "adamw with the learning rates 0.002 and"),
        (["--lr", "0.1", "--lr-factors", "2"], "--lr and --lr-factors both say"),
        (["--more-seeds", "1", "0"], "--more-seeds 0 is given twice"),
        (["--more-seeds", "4294967296"], "--more-seeds 4294967296 is out of range"),
        (["--optimizers"], "--optimizers is empty"),
        (["--lr", "0"], "--lr 0.0 is out of range"),
        (["--lr-factors", "-1"], "--lr-factors -1.0 is out of range"),
        (["--lr-embeddings", "nan"], "--lr-embeddings nan is out of range"),
    ],
)
def test_compare_checks_every_run_before_the_first(
    args: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = exits_with_message(["--out", str(out), *SHORT, *args], capsys)
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_option_goes_only_to_the_optimizers_that_use_it(
    tmp_path: Path, small: LlamaConfig
) -> None:
    options = compare.CompareOptions(
        out=tmp_path,
        optimizers=("adamw", "apollo", "galore", "muon"),
        rank=2,
        scale=3.0,
        embeddings="apollo",
    )
    runs = compare.grid(options, small)
    assert [(run.rank, run.scale, run.embeddings) for run in runs] == [
        (None, None, "adam"),
        (2, 3.0, "apollo"),
        (2, 3.0, "adam"),
        (None, None, "adam"),
    ]


def test_a_stop_in_the_last_step_of_a_run_stops_the_comparison(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = checkpoint.Checkpoints.save

    def stopped_save(self: Any, step: int, *args: Any) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, step, *args)

    args = ["--out", str(out), "--optimizers", "adamw", "sgd", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", stopped_save)
        compare.main(args)
    assert (
        "stopped by SIGTERM after adamw lr=0.002,0.03 seed=0; --resume auto"
        in capsys.readouterr().out
    )
    assert [path.name for path in out.iterdir()] == ["adamw-0.002-0.03-seed0"]
    compare.main([*args, "--resume", "auto"])
    assert len(table_rows(capsys.readouterr().out)) == 2


def test_compare_rejects_a_folder_with_other_runs(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--out", str(out), "--optimizers", "sgd", *SHORT]
    compare.main(args)
    assert "continue it with --resume auto" in exits_with_message(args, capsys)
    error = exits_with_message([*args, "--batch", "4", "--resume", "auto"], capsys)
    assert "holds another run (batch: 2 -> 4)" in error
    assert "continue it with --resume auto" in exits_with_message(
        [*args, "--lr", "0.5"], capsys
    )
    compare.main(
        [*args, "--lr", "0.5", "--resume", "auto"]
    )  # Another rate in the same comparison.


def test_table_fits_a_terminal_of_80_columns(out: Path, small: LlamaConfig) -> None:
    options = RunOptions(
        out=out, optimizer="apollo-mini", lr=0.0003, lr_embeddings=0.0015
    )
    options = recipes.with_defaults(options, small)
    results = tuple(
        RunResult(options, math.log(ppl), 999_999) for ppl in (1234.56, 1243.21)
    )
    sizes = {"apollo-mini": StateBytes(999_900_000, 999_900_000, 99_900)}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(compare.table([compare.Setting(options, results)], [options], sizes))
    assert "1238.88* 6.12" in (text := console.export_text())
    assert "999.9 MB 999.9 MB" in text
    assert "…" not in text
