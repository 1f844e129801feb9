import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from examples.llama import compare, export, pretrain, tokenise
from examples.llama import train as training
from examples.llama.config import PRESETS, LlamaConfig, param_count
from examples.llama.evaluate import make_evaluator
from examples.llama.hf.weights import load_params
from examples.llama.model import (
    Batch,
    graphdef_of,
    init_params,
    next_token_loss,
    pieces_of,
)
from examples.llama.optimizers import recipes
from examples.llama.options import CHOICES, RunOptions, parse
from examples.llama.run import checkpoint, recorder, setup
from examples.llama.run import log as run_log
from examples.llama.run.errors import UsageError
from examples.llama.run.interrupt import StopRequest
from examples.llama.step import StepMetrics, TrainState
from examples.llama.text import corpus, loader, tokenizer
from examples.llama.text.windows import validation_batches

SHORT = ["--steps", "3", "--batch", "2", "--seq", "16", "--eval-every", "2"]
RESUMED = [
    "--batch",
    "4",
    "--seq",
    "16",
    "--steps",
    "12",
    "--checkpoint-every",
    "4",
    "--resume",
    "auto",
]


def check_curves(folder: Path) -> None:
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def exits_with_message(
    main: Any, args: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def losses(folder: Path) -> list[tuple[int, float | None]]:
    return [(row["step"], row["loss"]) for row in run_log.read_metrics(folder)]


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def train(out: Path, finished_runs: Path) -> Callable[..., None]:
    """Fills `out` with a finished run; each command line is trained only once."""

    def train(*args: str) -> None:
        kept = finished_runs / " ".join(args)
        if kept.exists():
            shutil.copytree(kept, out)
        else:
            pretrain.main(["--out", str(out), *args])
            shutil.copytree(out, kept)

    return train


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("galore", marks=pytest.mark.slow)]
)
def test_pretrain_writes_its_files(
    optimizer: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(["--out", str(out), "--optimizer", optimizer, "--seed", "3", *SHORT])
    check_curves(out)
    assert (out / "checkpoints" / "3").is_dir()
    assert list((out / "tensorboard").iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == "tiny"
    assert config["model_config"]["hidden_size"] == 16
    assert config["made_with"]["jax"] == jax.__version__
    assert config["optimizer"] == optimizer
    assert config["seed"] == 3
    assert config["lr"] == recipes.RECIPES[optimizer].lr  # Defaults are filled in.
    rows = run_log.read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [32, 64, 96]
    assert [row["lr"] for row in rows][:2] == pytest.approx([0, config["lr"]])
    assert ["val_loss" in row for row in rows] == [False, True, True]
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(384), abs=0.5)
        assert row["tokens_per_s"] > 0
        assert row["grad_norm"] > 0
    assert rows[2]["val_ppl"] == pytest.approx(math.exp(rows[2]["val_loss"]))
    assert [isinstance(row.get("sample"), str) for row in rows] == [False, True, True]
    assert not any("update_rms_over_lr" in row for row in rows)
    output = capsys.readouterr()
    best = min(row["val_ppl"] for row in rows[1:])
    assert f"best validation perplexity {best:.2f} in 3 steps" in output.out
    assert repr(rows[2]["sample"]) in output.err
    assert "3/3" in output.err
    assert "tokens/s" in output.err
    assert f"tiny: {param_count(PRESETS['tiny']):,} parameters in float32" in output.err
    assert "on 1 of 8 cpu; 96 tokens, " in output.err


def test_the_size_of_updates_is_recorded_at_evaluations_if_asked_for(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_step(state: Any, *_: Any, frozen: None) -> tuple[TrainState, StepMetrics]:
        params = jax.tree.map(lambda p: p + 0.5, state.params)
        return TrainState(params, ()), StepMetrics(jnp.ones(()), jnp.ones(()))

    state = TrainState({"layers": {"up": {"kernel": jnp.zeros((2, 3, 4))}}}, ())
    monkeypatch.setattr(setup, "training_step", lambda *_: train_step)
    monkeypatch.setattr(setup, "initial_state", lambda *_: state)
    evaluated = {"val_loss": 1.0, "sample": ""}
    monkeypatch.setattr(
        training, "make_evaluation", lambda *_: lambda params, step: dict(evaluated)
    )
    options = RunOptions(out=out, steps=3, batch=2, seq=16, eval_every=2)
    with StopRequest() as stop:
        pretrain.pretrain(options, stop, measure_updates=True)
    rows = run_log.read_metrics(out)
    assert "update_rms_over_lr" not in rows[0]
    for row in rows[1:]:
        assert row["update_rms_over_lr"] == pytest.approx(0.5 / row["lr"])


def test_updates_of_weights_that_are_rounded_are_not_measured(out: Path) -> None:
    options = RunOptions(out=out, weights="bfloat16")
    with (
        StopRequest() as stop,
        pytest.raises(UsageError, match="`weights` bfloat16 .*`weights` float32"),
    ):
        pretrain.pretrain(options, stop, measure_updates=True)
    assert not out.exists()


def test_training_lowers_the_loss_and_repeats_exactly(out: Path) -> None:
    for name in ("a", "b"):
        args = [
            "--steps",
            "30",
            "--batch",
            "4",
            "--seq",
            "16",
            "--remat",
            "full",
            "--accumulate",
            "2",
        ]
        pretrain.main(
            ["--out", str(out / name), "--lr", "0.02", "--lr-embeddings", "0.02", *args]
        )
    assert losses(out / "a") == losses(out / "b")
    first, last = (run_log.read_metrics(out / "a")[step]["loss"] for step in (0, -1))
    assert last < first - 0.5
    rows = [run_log.read_metrics(out / name)[-1] for name in "ab"]
    assert rows[0]["sample"] == rows[1]["sample"]


@pytest.mark.parametrize(
    "optimizer",
    [
        "apollo",
        pytest.param("muon", marks=pytest.mark.slow),
        pytest.param("adafactor", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_continues_exactly(
    optimizer: str,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--optimizer", optimizer, *RESUMED]
    pretrain.main(["--out", str(out / "straight"), *args])
    cut = out / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(
            loader,
            "train_loader",
            interrupting(loader.train_loader, at=7, by=KeyboardInterrupt),
        )
        with pytest.raises(SystemExit):
            pretrain.main(["--out", str(cut), *args])
    assert [step for step, _ in losses(cut)] == [
        1,
        2,
        3,
        4,
        5,
    ]  # The sixth step was still on the device.
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # A killed process leaves such a line.
    capsys.readouterr()
    pretrain.main(["--out", str(cut), *args])
    assert "continuing after step 4 of 12" in capsys.readouterr().err
    assert losses(cut) == losses(out / "straight")
    samples = [
        run_log.read_metrics(out / name)[-1]["sample"] for name in ("straight", "cut")
    ]
    assert samples[0] == samples[1]
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["12", "8"]
    pretrain.main(["--out", str(cut), *args])  # Nothing is left to do.
    assert losses(cut) == losses(out / "straight")


def interrupting(loader: Callable[..., Any], at: int, by: Any) -> Callable[..., Any]:
    """Returns a loader that raises or calls `by` when batch `at` is asked for."""

    class Batches:
        def __init__(self, batches: Any) -> None:
            self.batches, self.asked = batches, 0
            self.get_state, self.set_state = batches.get_state, batches.set_state

        def __next__(self) -> Any:
            self.asked += 1
            if self.asked == at:
                if isinstance(by, type):
                    raise by
                by()
            return next(self.batches)

    return lambda *args, **kwargs: Batches(loader(*args, **kwargs))


@pytest.mark.slow  # The default tests compare steps on meshes in test_llama_mesh.
def test_a_batch_over_eight_devices_trains_as_on_one(out: Path) -> None:
    args = [
        "--steps",
        "12",
        "--batch",
        "16",
        "--seq",
        "16",
        "--accumulate",
        "2",
        "--checkpoint-every",
        "4",
    ]
    pretrain.main(["--out", str(out / "one"), *args])
    pretrain.main(["--out", str(out / "eight"), "--mesh", "data=8", *args])
    rows = [run_log.read_metrics(out / name) for name in ("one", "eight")]
    for one, eight in zip(*rows, strict=True):
        assert eight["loss"] == pytest.approx(one["loss"], rel=1e-5)
    # One device continues from a checkpoint of eight.
    shutil.rmtree(out / "eight" / "checkpoints" / "12")
    pretrain.main(["--out", str(out / "eight"), "--resume", "auto", *args])
    for one, moved in zip(rows[0], run_log.read_metrics(out / "eight"), strict=True):
        assert moved["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_a_run_save_and_end(
    number: signal.Signals,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop = interrupting(
            loader.train_loader, at=6, by=lambda: os.kill(os.getpid(), number)
        )
        patch.setattr(loader, "train_loader", stop)
        pretrain.main(["--out", str(out), *RESUMED])
    assert f"stopped by {number.name} after step 6 of 12" in (
        output := capsys.readouterr().out
    )
    assert str(out / "checkpoints" / "6") in output
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5, 6]
    assert signal.getsignal(number) is before
    pretrain.main(["--out", str(out), *RESUMED])
    assert [step for step, _ in losses(out)] == list(range(1, 13))


def test_rejects_resuming_with_other_options(
    out: Path, train: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*RESUMED)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    args = ["--out", str(out), *RESUMED, "--lr", "0.5", "--batch", "8"]
    error = exits_with_message(pretrain.main, args, capsys)
    assert (
        "holds another run (batch: 4 -> 8; lr: 0.007 -> 0.5); give the same options"
        in error
    )
    # config.json may have been edited, so the checkpoint is compared too.
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"lr": 0.5, "batch": 8}))
    metrics = (out / "metrics.jsonl").read_bytes()
    # The log now ends before the checkpoint's step.
    (out / "metrics.jsonl").write_bytes(
        b"".join(metrics.splitlines(keepends=True)[:11])
    )
    error = exits_with_message(pretrain.main, args, capsys)
    checkpoint = out / "checkpoints" / "12"
    assert (
        f"checkpoint {checkpoint} is of another run (batch: 4 -> 8; lr: 0.007 -> 0.5"
        in error
    )
    (out / "config.json").write_text(json.dumps(config))
    error = exits_with_message(pretrain.main, ["--out", str(out), *RESUMED], capsys)
    assert (
        "metrics.jsonl has 11 of the 12 steps that the checkpoint goes on from; put it back"
        in error
    )
    (out / "metrics.jsonl").write_bytes(metrics)
    unchanged = {
        path: content for path, content in files.items() if path.name != "config.json"
    }
    assert all(path.read_bytes() == content for path, content in unchanged.items())
    # Options that change no result may differ, and the text may have moved.
    more = ["--keep-checkpoints", "5", "--workers", "1", "--vocab", "384"]
    shutil.rmtree(checkpoint)
    cut_to(out, 11)
    pretrain.main(["--out", str(out), *RESUMED, *more])
    assert json.loads((out / "config.json").read_text())["workers"] == 1


def test_text_can_be_tokenised_before_the_run(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenise.main(["--vocab", "300"])
    assert " of 300 kinds, ready for runs" in capsys.readouterr().out
    monkeypatch.setattr(corpus, "build", lambda *_: pytest.fail("tokenised again"))
    more = ["--vocab", "300", "--eval-windows", "9000"]
    pretrain.main(["--out", str(out), *more, *SHORT])
    assert "windows instead of --eval-windows 9000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vocab", "5"], "--vocab 5 is out of range"),
        (["--tokenizer", ""], "--tokenizer is empty"),
        (["--validation", ""], "--validation is empty"),
        (["--data", "hf:a/b"], "--data hf:a/b may have no end, and a run takes a part"),
        (["--save-tokenizer", "."], "--save-tokenizer . is not a .json file"),
        (["--save-tokenizer", "name"], "--save-tokenizer name is not a .json file"),
    ],
)
def test_rejects_what_to_tokenise(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in exits_with_message(tokenise.main, args, capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            "[]",
            "config.json is no run's configuration; give another folder",
        ),
        ("config.json", '{"hidden_size": 3}', "config.json is no run's configuration"),
        ("config.json", "{", "config.json cannot be read (Expecting property name"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 3}\n', "line 2 of "),
        ("metrics.jsonl", "1\n", "is not the metrics of step 1; mend it"),
        ("metrics.jsonl", "{}\n", "is not the metrics of step 1; mend it"),
        ("metrics.jsonl", "{\n", "is not the metrics of step 1; mend it"),
    ],
)
def test_rejects_a_damaged_run_and_overwrites_nothing(
    name: str,
    content: str,
    message: str,
    out: Path,
    train: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(*SHORT)
    (out / name).write_text(content)
    error = exits_with_message(
        pretrain.main, ["--out", str(out), *SHORT, "--resume", "auto"], capsys
    )
    assert message in error
    assert (out / name).read_text() == content


def test_a_run_without_its_checkpoints(
    out: Path, train: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run stays as it is. Another starts again, and its metrics are kept."""
    train(*RESUMED)
    shutil.rmtree(out / "checkpoints")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    pretrain.main(["--out", str(out), *RESUMED])
    assert {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file()
    } == files
    expected = losses(out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:6]))
    capsys.readouterr()
    pretrain.main(["--out", str(out), *RESUMED])
    assert (
        f"has no checkpoint: starting again at step 1; the metrics so far are in {out}"
        in capsys.readouterr().err
    )
    assert (out / "metrics.jsonl.1").read_text() == "".join(lines[:6])
    assert losses(out) == expected


def test_a_run_without_newer_fields_has_their_defaults(
    out: Path, train: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*SHORT)
    config = json.loads((out / "config.json").read_text())
    assert config["rounding"] == "nearest"  # The field's default is None.
    for name in ("accumulate", "attention", "rounding", "head", "b2", "clip_norm"):
        del config[name]
    (out / "config.json").write_text(json.dumps(config))
    pretrain.main(["--out", str(out), *SHORT, "--resume", "auto"])
    args = ["--out", str(out), *SHORT, "--resume", "auto", "--accumulate", "2"]
    assert "(accumulate: 1 -> 2)" in exits_with_message(pretrain.main, args, capsys)


def write_bos_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer that puts <s> before a text; returns its folder."""
    given = tokenizer.train_tokenizer(["def f(x):\n    return x + 1\n"], 300).tokenizer
    given.add_special_tokens(["<s>"])
    given.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", given.token_to_id("<s>"))]
    )
    folder.mkdir()
    given.save(str(folder / "tokenizer.json"))
    return folder


class BeginsError(Exception):
    """Ends a run that has passed all checks and written its first files."""


@pytest.fixture
def only_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any) -> None:
        raise BeginsError

    monkeypatch.setattr(setup, "initial_state", begin)


@pytest.mark.usefixtures("only_begins")
def test_a_run_older_than_bos_continues_without_bos(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bos_tokenizer(tmp_path / "given")
    args = ["--out", str(out), "--tokenizer", str(folder), *SHORT, "--resume", "auto"]
    with pytest.raises(BeginsError):
        pretrain.main([*args, "--bos", "never"])
    config = json.loads((out / "config.json").read_text())
    assert config.pop("bos") == "never"
    (out / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        with pytest.raises(BeginsError):
            pretrain.main(args)
        resumed = json.loads((out / "config.json").read_text())
        assert resumed["bos"] == "never"
        assert resumed["corpus"] == config["corpus"]
    # A new run has BOS.
    config["bos"] = "auto"
    (out / "config.json").write_text(json.dumps(config))
    error = exits_with_message(pretrain.main, args, capsys)
    assert f"--out {out} holds another run (corpus: " in error


@pytest.mark.usefixtures("only_begins")
def test_a_run_keeps_the_files_beside_its_tokenizer(out: Path, tmp_path: Path) -> None:
    folder = write_bos_tokenizer(tmp_path / "given")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    args = ["--out", str(out), "--tokenizer", str(folder), *SHORT, "--resume", "auto"]
    for template in ("{{ messages }}", "another"):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(BeginsError):
            pretrain.main(args)
        kept = {path.name: path.read_text() for path in (out / "pretrained").iterdir()}
        # A resumed run keeps the files that it began with.
        assert kept == {
            "chat_template.jinja": "{{ messages }}",
            "tokenizer.json": (folder / "tokenizer.json").read_text(),
        }
    # A run that is older than this folder takes the files that exist now.
    shutil.rmtree(out / "pretrained")
    files = export.passed_on(out, json.loads((out / "config.json").read_text()))
    assert files["chat_template.jinja"].read_text() == "another"


def test_an_export_says_which_files_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"init_from": str(tmp_path / "gone" / "it" / "is"), "tokenizer": None}
    assert export.passed_on(tmp_path, run) == {}
    error = capsys.readouterr().err
    assert error.startswith("the chat template and the special tokens of what ")
    assert "does not exist" in error
    assert export.passed_on(tmp_path, {"init_from": None}) == {}
    assert capsys.readouterr().err == ""


def test_rejects_a_second_run_in_a_folder(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_log.only_run_in(out):
        error = exits_with_message(pretrain.main, ["--out", str(out), *RESUMED], capsys)
    assert f"--out {out} is in use by another run; wait for its end" in error
    assert [path.name for path in out.iterdir()] == [".lock"]
    pretrain.main(["--out", str(out), *SHORT])


def cut_to(out: Path, step: int) -> None:
    """Makes a run look as if it had been killed after `step`."""
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:step]))


def damage(out: Path, step: int) -> None:
    (out / "checkpoints" / str(step) / "data" / "metadata").write_text('{"next')


def test_a_damaged_checkpoint_is_set_aside(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(["--out", str(out), *RESUMED, "--keep-checkpoints", "3"])
    expected = losses(out)
    shutil.rmtree(out / "checkpoints" / "12")
    cut_to(out, 11)
    damage(out, 8)
    capsys.readouterr()
    pretrain.main(["--out", str(out), *RESUMED])
    errors = capsys.readouterr().err
    assert "checkpoint 8 cannot be read (" in errors
    assert f"it is now {out / 'checkpoints' / '8.1'}" in errors
    assert "continuing after step 4 of 12" in errors
    assert losses(out) == expected
    assert (out / "checkpoints" / "8.1" / "state").is_dir()


def test_unreadable_checkpoints_are_left_as_they_are(
    out: Path,
    train: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(*RESUMED)
    shutil.rmtree(out / "checkpoints" / "12")
    cut_to(out, 11)

    def no_room(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes\nmore"
        )

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_restore", no_room)
        error = exits_with_message(pretrain.main, ["--out", str(out), *RESUMED], capsys)
    assert (
        "the device's memory is too small (RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes)"
        in error
    )
    damage(out, 8)
    for _ in range(2):  # A supervisor may restart the run.
        error = exits_with_message(pretrain.main, ["--out", str(out), *RESUMED], capsys)
        assert (
            f"none of the checkpoints in {out / 'checkpoints'} can be read (8: "
            in error
        )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["8"]
    assert len(losses(out)) == 11


def poisoned(steps: set[int]) -> Callable[..., Any]:
    """Returns a loader whose batches of `steps` have a token outside the vocabulary."""
    train_loader = loader.train_loader

    class Batches:
        def __init__(self, batches: Any) -> None:
            self.batches, self.step = batches, 0
            self.get_state, self.set_state = batches.get_state, batches.set_state

        def __next__(self) -> Any:
            self.step += 1
            return next(self.batches) + (10**6 if self.step in steps else 0)

    return lambda *args, **kwargs: Batches(train_loader(*args, **kwargs))


def test_a_step_that_is_not_finite_ends_the_run(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "train_loader", poisoned({7}))
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--out", str(out), *RESUMED])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: the loss is nan and the gradient's norm nan at step 7; "
    )
    assert f"the last good checkpoint is {out / 'checkpoints' / '4'}" in last
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5, 6]


def test_steps_that_are_not_finite_are_skipped_and_counted(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loader, "train_loader", poisoned({3, 7}))
        pretrain.main(["--out", str(out), *RESUMED, "--on-nonfinite", "skip"])
    rows = run_log.read_metrics(out)
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 7]
    assert [row["skipped_steps"] for row in rows] == [
        0,
        0,
        1,
        1,
        1,
        1,
        2,
        2,
        2,
        2,
        2,
        2,
    ]
    assert rows[2]["lr"] == rows[3]["lr"]  # A skipped step does not advance it.
    assert rows[-1]["val_loss"] < 6
    check_curves(out)
    # The same holds in a resumed run that does not skip.
    cut_to(out, 10)
    shutil.rmtree(out / "checkpoints" / "12")
    pretrain.main(["--out", str(out), *RESUMED])
    assert [row["lr"] for row in run_log.read_metrics(out)] == [
        row["lr"] for row in rows
    ]


def test_a_run_ends_after_too_many_skipped_steps(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "train_loader", poisoned(set(range(5, 40))))
    args = ["--batch", "2", "--seq", "16", "--steps", "40", "--on-nonfinite", "skip"]
    with pytest.raises(SystemExit):
        pretrain.main(["--out", str(out), *args])
    errors = capsys.readouterr().err
    assert "step 5 is skipped: the loss is nan" in errors
    assert (
        "error: no loss or gradient was finite in the 20 steps up to 24"
        in errors.splitlines()[-1]
    )


def test_exported_weights_are_those_of_the_checkpoint(
    out: Path, tmp_path: Path
) -> None:
    """Training that starts from them starts where the run ended."""
    pretrain.main(["--out", str(out), *SHORT, "--checkpoint-every", "2"])
    exported = tmp_path / "exported"
    export.main(["--run", str(out), "--to", str(exported)])
    small = PRESETS["tiny"]
    # The run evaluates two rows at once, as many as a step has.
    windows = held_out(out).reshape(-1, 2, 17)
    evaluate = make_evaluator(pieces_of(small), Batch(windows))
    loss = evaluate(load_params(exported, small, "float32"))
    assert loss == pytest.approx(run_log.read_metrics(out)[-1]["val_loss"], abs=1e-6)
    export.main(["--run", str(out), "--to", str(tmp_path / "earlier"), "--step", "2"])
    earlier = load_params(tmp_path / "earlier", small, "float32")
    loss = evaluate(earlier)
    assert loss == pytest.approx(run_log.read_metrics(out)[1]["val_loss"], abs=1e-6)
    tuned = tmp_path / "tuned"
    tokenizer_config = json.loads((exported / "tokenizer_config.json").read_text())
    tokenizer_config |= {"chat_template": "{{ messages }}", "pad_token": "<|end|>"}
    (exported / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    pretrain.main(["--out", str(tuned), "--init-from", str(exported), *SHORT])
    # The run has its own copy of the tokenizer's files.
    shutil.rmtree(exported)
    export.main(["--run", str(tuned), "--to", str(tmp_path / "chat")])
    found = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    assert found == tokenizer_config
    assert (
        run_log.read_metrics(tuned)[0]["loss"]
        < run_log.read_metrics(out)[0]["loss"] - 0.1
    )
    assert json.loads((tuned / "config.json").read_text())["model"] is None


def held_out(out: Path) -> np.ndarray:
    return validation_batches(
        corpus.load_corpus("stdlib", vocab_size=384).validation, seq=16
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--run", "nowhere"], "nowhere/config.json cannot be read ("),
        (["--step", "2"], "has not got checkpoint 2; it has those of steps [3]"),
        (
            ["--best"],
            "has no checkpoint; leave out --best: only fine-tuning keeps",
        ),
        (["--dtype", "int8"], "--dtype 'int8'"),
    ],
)
def test_rejects_exports(
    args: list[str],
    message: str,
    out: Path,
    train: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(*SHORT)
    to = tmp_path / "exported"
    assert message in exits_with_message(
        export.main, ["--run", str(out), "--to", str(to), *args], capsys
    )
    assert not to.exists()
    tokenizer = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text("{}")
    error = exits_with_message(
        export.main, ["--run", str(out), "--to", str(to)], capsys
    )
    assert "tokenizer.json cannot be read (" in error
    config = json.loads((out / "config.json").read_text())
    other_shape = config["model_config"] | {"experts": 8}
    for changed in (
        {name: value for name, value in config.items() if name != "weights"},
        config | {"model_config": other_shape},
        config | {"model_config": config["model_config"] | {"model_type": "gpt"}},
    ):
        (out / "config.json").write_text(json.dumps(changed))
        error = exits_with_message(
            export.main, ["--run", str(out), "--to", str(to)], capsys
        )
        assert "config.json is not of this version (" in error
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_text(tokenizer)
    shutil.rmtree(out / "checkpoints")
    error = exits_with_message(
        export.main, ["--run", str(out), "--to", str(to)], capsys
    )
    assert "has no checkpoint; let the run save one, with --resume auto" in error
    to.mkdir()
    (to / "config.json").write_text("earlier")
    assert str(to) in exits_with_message(
        export.main, ["--run", str(out), "--to", str(to)], capsys
    )
    assert [path.read_text() for path in to.iterdir()] == ["earlier"]


def test_flops_utilisation_is_shown_where_the_peak_is_known(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorder.flops, "peak_flops", lambda kind, dtype: 1e12)
    pretrain.main(["--out", str(out), *SHORT])
    rows = run_log.read_metrics(out)
    for row in rows:
        flops = recorder.flops.flops_per_token(PRESETS["tiny"], 16)
        # Only one of the eight devices trains.
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / 1e12)
    assert "MFU" in capsys.readouterr().err


def test_diverged_run_says_so_and_keeps_its_metrics(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        (
            ["--optimizer", "adam"],
            "--optimizer 'adam' is unknown; choose one of: adamw, ",
        ),
        (["--data", "std"], "--data 'std' is unknown; choose one of: stdlib"),
        (["--remat", "ful"], "--remat 'ful' is unknown; choose one of: full, "),
        (
            ["--weights", "float16"],
            "--weights 'float16' is unknown; choose one of: bfloat16, float32",
        ),
        (["--resume", "yes"], "--resume 'yes' is unknown; choose one of: "),
        (
            ["--batch", "6", "--accumulate", "4"],
            "--batch 6 is not a multiple of --accumulate 4",
        ),
        (
            ["--batch", "12", "--accumulate", "2", "--mesh", "data=8"],
            "--batch 12 in --accumulate 2 micro-batc",
        ),
        (
            ["--mesh", "data=16", "--batch", "16"],
            "--mesh data=16 needs 16 devices, and the devices here are 8 (cpu)",
        ),
        (
            ["--seed", "4294967296"],
            "--seed 4294967296 is out of range; give 0 to 4294967295",
        ),
        (
            ["--optimizer", "sgd", "--embeddings", "apollo"],
            "--embeddings apollo means nothing to ",
        ),
        (
            ["--optimizer", "apollo-zero", "--embeddings", "apollo"],
            "--embeddings apollo means nothing to --optimizer apollo-zero; leave it",
        ),
        (["--eval-windows", "0"], "--eval-windows 0 is out of range"),
        (
            ["--steps", "1000000000000"],
            "--steps 1000000000000 is out of range; give 1 to 2147483647",
        ),
        (["--workers", "100000"], "--workers 100000 is out of range; give 1 to 256"),
        (["--tokenizer", ""], "--tokenizer is empty"),
        (["--attention", "cudnn"], "--attention cudnn takes an NVIDIA GPU"),
        (
            ["--optimizer", "lion", "--rank", "8"],
            "--rank 8 means nothing to --optimizer lion; leave it out",
        ),
        (
            ["--mesh", "rows=2"],
            "--mesh 'rows' is unknown; choose one of: fsdp, tensor, data",
        ),
        (["--mesh", "data=two"], "--mesh data=two is malformed"),
        (
            ["--model", "tiny", "--init-from", "x"],
            "--model tiny and --init-from x both give the model",
        ),
        (
            ["--init-from", "nowhere"],
            "--init-from 'nowhere' does not exist; give a folder",
        ),
        (["--init-from", ""], "--init-from is empty"),
        (["--vocab", "500"], "--vocab 500"),
        (
            ["--tokenizer", "nowhere.json"],
            "--tokenizer 'nowhere.json' does not exist; give a ",
        ),
        (
            ["--seq", "120", "--batch", "1"],
            "--seq 120 in validation batches of 8 needs",
        ),
        (["--embeddings", "sgd"], "--embeddings 'sgd' is unknown; choose one of: "),
        (["--head", "sgd"], "--head 'sgd' is unknown; choose one of: "),
        (
            ["--optimizer", "racs", "--head", "apollo"],
            "--head apollo means nothing to --optimizer racs",
        ),
        (
            ["--moment-dtype", "bf16"],
            "--moment-dtype 'bf16' is unknown; choose one of: bfloat16",
        ),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--rank", "-1"], "--rank -1 is out of range"),
        (["--clip-norm", "0"], "--clip-norm 0.0 is out of range; give a number above"),
        (["--b2", "1"], "--b2 1.0 is out of range; give a number from 0 to below 1"),
        (["--b2", "nan"], "--b2 nan is out of range"),
        (["--weight-decay", "-0.1"], "--weight-decay -0.1 is out of range; give 0 or"),
        (["--weight-decay", "inf"], "--weight-decay inf is out of range"),
        (["--lr", "nan"], "--lr nan is out of range"),
        (["--lr-embeddings", "0"], "--lr-embeddings 0.0 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range; give 0 to 4294967295"),
        (["--seq", "129"], "--seq 129 is too long; --model tiny takes 128"),
        (["--batch", "9999"], "--batch 9999 of --seq 16 needs"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    args: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = exits_with_message(
        pretrain.main, ["--out", str(out), *SHORT, *args], capsys
    )
    assert error.startswith("error: " + message)
    assert not out.exists()


@pytest.mark.parametrize("main", [pretrain.main, compare.main])
@pytest.mark.parametrize("name", run_log.OF_A_RUN)
def test_rejects_a_folder_with_a_run(
    main: Any, name: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir(parents=True)
    (out / name).write_text("earlier")
    error = exits_with_message(main, ["--out", str(out), *SHORT], capsys)
    assert (
        f"already holds a run ({name}); continue it with --resume auto, choose another folder"
        in error
    )
    if name != run_log.CONFIG and main is pretrain.main:
        error = exits_with_message(
            main, ["--out", str(out), *SHORT, "--resume", "auto"], capsys
        )
        assert f"already holds a run ({name}); its config.json is missing" in error
    assert [path.read_text() for path in out.iterdir()] == ["earlier"]


@pytest.mark.parametrize(
    ("main", "flag"), [(pretrain.main, "--out"), (tokenise.main, "--save-tokenizer")]
)
def test_rejects_the_address_of_a_bucket(
    main: Any,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    error = exits_with_message(main, [flag, "gs://bucket/run"], capsys)
    assert error.startswith(
        f"error: {flag} gs://bucket/run is an address, not a path; mount the bucket"
    )
    assert not list(tmp_path.iterdir())


def test_a_home_folder_is_found_after_an_equals_sign() -> None:
    parsed = parse(RunOptions, ["--out=~/runs/x"], "pretrain")
    assert parsed.out == Path.home() / "runs" / "x"
    options = RunOptions(out=Path("x"), init_from="~/a")
    assert options.init_from == str(Path.home() / "a")
    with pytest.raises(UsageError, match="`out` ~nobody-at-all/x is in the home"):
        parse(RunOptions, ["--out=~nobody-at-all/x"], "pretrain")


@pytest.mark.parametrize("folder", ["", ".", "./"])
def test_rejects_the_current_folder(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    error = exits_with_message(pretrain.main, ["--out", folder, *SHORT], capsys)
    assert error.startswith("error: --out is empty or the current folder; name")
    assert not list(tmp_path.iterdir())


def test_rejects_a_file_as_folder(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.parent.mkdir()
    out.write_text("earlier")
    assert "is a file" in exits_with_message(
        pretrain.main, ["--out", str(out), *SHORT], capsys
    )
    error = exits_with_message(
        pretrain.main, ["--out", str(out / "below"), *SHORT], capsys
    )
    assert "Not a directory" in error
    assert out.read_text() == "earlier"


def test_a_run_of_very_many_steps_begins(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = interrupting(
        loader.train_loader, at=2, by=lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    monkeypatch.setattr(loader, "train_loader", stop)
    pretrain.main(["--out", str(out), *SHORT, "--steps", str(2**31 - 1)])
    assert [step for step, _ in losses(out)] == [1, 2]


def test_a_command_line_that_does_not_parse_exits_with_status_2(out: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--out", str(out), "--steps", "many"])
    assert exit_.value.code == 2
    assert not out.exists()


@pytest.mark.parametrize("main", [pretrain.main, compare.main])
def test_help_names_every_choice(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    help_ = capsys.readouterr().out
    assert all(
        name in help_
        for name in (*PRESETS, *recipes.RECIPES, "stdlib", ".parquet", "hf:")
    )
    assert all(name in help_ for names in CHOICES.values() for name in names)


def test_evaluator_averages_over_all_batches(small: LlamaConfig) -> None:
    graphdef, params = graphdef_of(small), init_params(small, seed=0)
    batches = np.random.default_rng(0).integers(
        0, small.vocab_size, (3, 2, 9), np.int32
    )
    expected = np.mean(
        [next_token_loss(graphdef, params, Batch(jax.numpy.array(b))) for b in batches]
    )
    assert make_evaluator(pieces_of(small), Batch(batches))(params) == pytest.approx(
        float(expected), abs=1e-6
    )
