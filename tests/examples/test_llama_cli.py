import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from examples.llama import compare, optimizers, pretrain, run_log
from examples.llama.config import PRESETS
from examples.llama.corpus import SOURCES
from examples.llama.evaluate import make_evaluator
from examples.llama.model import init_model, next_token_loss
from examples.llama.options import RunOptions
from examples.llama.state_size import StateBytes

SHORT = ["--steps", "3", "--batch", "2", "--seq", "16", "--eval-every", "2"]


@pytest.fixture
def out(stdlib: Path, tiny_is_small: None, tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def check_curves(folder: Path) -> None:
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def exits_with_message(main: Any, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("optimizer", ["adamw", "apollo"])
def test_pretrain_writes_its_files(optimizer: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(["--out", str(out), "--optimizer", optimizer, "--seed", "3", *SHORT])
    check_curves(out)
    config = json.loads((out / "config.json").read_text())
    assert config["optimizer"] == optimizer
    assert config["seed"] == 3
    assert config["lr"] == optimizers.RECIPES[optimizer].lr  # Defaults are filled in.
    rows = run_log.read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [32, 64, 96]
    assert [row["lr"] for row in rows][:2] == pytest.approx([0, config["lr"]])
    assert ["val_loss" in row for row in rows] == [False, True, True]
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(384), abs=0.5)
        assert row["tokens_per_s"] > 0
    assert rows[2]["val_ppl"] == pytest.approx(math.exp(rows[2]["val_loss"]))
    output = capsys.readouterr()
    assert f"validation perplexity {rows[2]['val_ppl']:.2f} after 3 steps" in output.out
    assert "3/3" in output.err
    assert "tokens/s" in output.err


def test_training_lowers_the_loss_and_repeats_exactly(out: Path) -> None:
    losses = []
    for name in ("a", "b"):
        folder = str(out / name)
        args = ["--steps", "30", "--batch", "4", "--seq", "16", "--remat", "full"]
        pretrain.main(["--out", folder, "--lr", "0.02", "--lr-embeddings", "0.02", *args])
        losses.append([row["loss"] for row in run_log.read_metrics(out / name)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


def test_diverged_run_says_so_and_keeps_its_metrics(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--out", str(out), "--lr-embeddings", "30", *SHORT])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the ")
    assert "at step" in error
    assert "lower --lr" in error
    assert run_log.read_metrics(out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "70m"], "--model '70m' is unknown; choose one of: 60m, "),
        (["--optimizer", "adam"], "--optimizer 'adam' is unknown; choose one of: adamw, "),
        (["--data", "std"], "--data 'std' is unknown; choose one of: stdlib"),
        (["--remat", "ful"], "--remat 'ful' is unknown; choose one of: full, none"),
        (["--embeddings", "sgd"], "--embeddings 'sgd' is unknown; choose one of: "),
        (["--moment-dtype", "bf16"], "--moment-dtype 'bf16' is unknown; choose one of: bfloat16"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--rank", "-1"], "--rank -1 is out of range"),
        (["--lr", "nan"], "--lr nan is out of range"),
        (["--lr-embeddings", "0"], "--lr-embeddings 0.0 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range; give 0 or more"),
        (["--seq", "129"], "--seq 129 is too long; --model tiny takes 128"),
        (["--batch", "9999"], "--batch 9999 of --seq 16 needs"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    args: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = exits_with_message(pretrain.main, ["--out", str(out), *SHORT, *args], capsys)
    assert error.startswith("error: " + message)
    assert not out.exists()


@pytest.mark.parametrize("main", [pretrain.main, compare.main])
@pytest.mark.parametrize("name", [run_log.METRICS, run_log.CONFIG, run_log.CURVES])
def test_a_folder_with_a_run_is_refused(
    main: Any, name: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir(parents=True)
    (out / name).write_text("earlier")
    error = exits_with_message(main, ["--out", str(out), *SHORT], capsys)
    assert f"already holds a run ({name}); choose another folder" in error
    assert [path.read_text() for path in out.iterdir()] == ["earlier"]


def test_a_file_is_refused_as_folder(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.parent.mkdir()
    out.write_text("earlier")
    assert "is a file" in exits_with_message(pretrain.main, ["--out", str(out), *SHORT], capsys)


def test_a_command_line_that_does_not_parse_exits_with_status_2(out: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--out", str(out), "--steps", "many"])
    assert exit_.value.code == 2
    assert not out.exists()


@pytest.mark.parametrize("main", [pretrain.main, compare.main])
def test_help_names_everything_there_is(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    help_ = capsys.readouterr().out
    assert all(name in help_ for name in (*PRESETS, *optimizers.RECIPES, *SOURCES))


def test_compare_ends_with_a_table(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["--out", str(out), "--lr", "0.01", "--lr-embeddings", "0.003", *SHORT])
    check_curves(out)
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if line.startswith("optimizer"))
    assert head.split() == [
        *("optimizer", "lr", "lr", "emb", "val", "ppl", "kernels", "emb+head", "rest", "time", "tokens/s")
    ]
    rows = [line.split() for line in lines if line.startswith(("adamw", "apollo"))]
    assert [row[:3] for row in rows] == [["adamw", "0.01", "0.003"], ["apollo-mini", "0.01", "0.003"]]
    losses = []
    for row in rows:
        folder = out / f"{row[0]}-0.01-0.003"
        check_curves(folder)
        metrics = run_log.read_metrics(folder)
        losses.append([line["loss"] for line in metrics])
        assert row[3] == f"{metrics[-1]['val_ppl']:.2f}"
        assert row[6:8] == ["98.3", "kB"]  # Two moments of embeddings and head, in float32.
    assert rows[0][4:6] == ["52.2", "kB"]
    # Both see the same batches, and the first step's learning rate is 0.
    assert losses[0][:2] == pytest.approx(losses[1][:2], abs=1e-6)
    assert losses[0][2] != losses[1][2]


def test_compare_runs_every_optimizer_at_every_pair_of_rates(tmp_path: Path) -> None:
    runs = compare.runs_of(
        compare.CompareOptions(
            out=tmp_path, optimizers=("adamw", "apollo"), lr=(0.1, 0.2), lr_embeddings=(0.3, 0.4)
        )
    )
    assert [run.out.name for run in runs] == [
        f"{name}-{rates}"
        for name in ("adamw", "apollo")
        for rates in ("0.1-0.3", "0.1-0.4", "0.2-0.3", "0.2-0.4")
    ]
    (default,) = compare.runs_of(compare.CompareOptions(out=tmp_path, optimizers=("adamw",)))
    assert (default.lr, default.lr_embeddings) == optimizers.RECIPES["adamw"][1:3]


def test_compare_goes_on_after_a_run_that_diverged(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["--out", str(out), "--optimizers", "adamw", "--lr-embeddings", "30", "0.01", *SHORT])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("adamw ") and "loss" not in line]
    assert rows[0][3:] == ["diverged"]
    assert len(rows[1]) > 4
    check_curves(out)


def test_compare_checks_every_run_before_the_first(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--out", str(out), "--optimizers", "adamw", "apolo", *SHORT]
    assert "--optimizer 'apolo' is unknown" in exits_with_message(compare.main, args, capsys)
    args = ["--out", str(out), "--lr", "0.1", "0.10", *SHORT]
    assert "is given twice" in exits_with_message(compare.main, args, capsys)
    assert not out.exists()


def test_table_fits_a_terminal_of_80_columns(out: Path) -> None:
    options = optimizers.with_defaults(
        RunOptions(out=out, optimizer="apollo-mini", lr=0.0003, lr_embeddings=0.0015)
    )
    state = StateBytes(999_900_000, 999_900_000, 99_900)
    result = pretrain.RunResult(options, math.log(1234.56), state, 9999, 999_999)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(compare.table([result]))
    assert "999.9 MB 999.9 MB" in (text := console.export_text())
    assert "…" not in text


def test_evaluator_averages_over_all_batches(small: Any) -> None:
    graphdef, params = init_model(small, seed=0)
    batches = np.random.default_rng(0).integers(0, small.vocab_size, (3, 2, 9), np.int32)
    expected = np.mean([next_token_loss(graphdef, params, jax.numpy.array(b)) for b in batches])
    assert make_evaluator(graphdef, batches)(params) == pytest.approx(float(expected), abs=1e-6)
