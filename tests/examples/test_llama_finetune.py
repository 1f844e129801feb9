"""The fine-tuning command: what it writes, how it resumes, and what it rejects."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.llama import export, finetune
from examples.llama.config import LlamaConfig
from examples.llama.evaluate import make_evaluator
from examples.llama.hf.weights import load_params
from examples.llama.model import pieces_of
from examples.llama.optimizers.pipeline import make_schedule
from examples.llama.optimizers.recipes import RECIPES, with_defaults
from examples.llama.options import FinetuneOptions, RunOptions
from examples.llama.run import log as run_log
from examples.llama.run import setup
from examples.llama.run.checkpoint import BestWeights
from examples.llama.run.errors import UsageError
from examples.llama.run.interrupt import StopRequest
from tests.examples.chat_models import CHATML, chat_tokenizer, write_tokenizer
from tests.examples.chat_runs import SHORT, refused, without_times, words
from tests.examples.chat_runs import start as start
from tests.examples.conftest import SMALL

FAST = ["--optimizer", "adamw", "--lr", "0.01", "--lr-embeddings", "0.01"]


def test_best_weights_are_the_best_of_those_that_are_left(tmp_path: Path) -> None:
    losses = {1: 0.9, 2: 0.5, 3: 0.7, 4: 0.4, 5: 0.6}
    rows = ({"step": step, "val_loss": loss} for step, loss in losses.items())
    (tmp_path / run_log.METRICS).write_text("".join(json.dumps(r) + "\n" for r in rows))

    def evaluated(*steps: int, after: int) -> list[str]:
        """Evaluates at some steps of a resumed run; returns the steps in best/."""
        with BestWeights(tmp_path, step=after, config={}) as best:
            evaluate = best.kept_by(lambda params, step: {"val_loss": losses[step]})
            for step in steps:
                evaluate({"w": np.full(2, step)}, step)
        return [path.name for path in (tmp_path / run_log.BEST).iterdir()]

    assert evaluated(1, 2, 3, 4, after=0) == ["4"]
    # The weights of step 2 are gone, so those of step 5 are the best of the rest.
    assert evaluated(5, after=3) == ["5"]
    losses[6] = 0.65
    assert evaluated(6, after=5) == ["5"]


def test_trains_resumes_and_exports(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    args = words(
        start, out, *SHORT, *FAST, "--checkpoint-every", "4", "--epochs", "0.4"
    )
    finetune.main(args)
    output = capsys.readouterr()
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 8
    assert "39 conversations and 1 held out; " in output.err
    assert "in 39 rows of 48, 87% full; 8 steps of 2 rows are 0.41 epochs" in output.err
    rows = run_log.read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["val_loss"] < rows[2]["val_loss"] < rows[0]["loss"]
    assert "?\n> " in rows[-1]["sample"]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert [path.name for path in (out / "best").iterdir()] == [str(best)]
    assert f"lowest held-out perplexity {np.exp(losses[best]):.2f}" in output.out
    # A run that was killed after step 7 continues as if it had not been.
    whole = without_times(out)
    shutil.rmtree(out / "checkpoints" / "8")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:7]))
    finetune.main([*args, "--resume", "auto"])
    assert without_times(out) == whole
    assert "continuing after step 4" in capsys.readouterr().err
    assert [path.name for path in (out / "best").iterdir()] == [str(best)]
    # The export has the best weights and the template, and gives the loss of the run.
    exported = tmp_path / "exported"
    export.main(["--run", str(out), "--to", str(exported), "--best"])
    kept = json.loads((exported / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == CHATML.replace("You help.", "")
    options = FinetuneOptions(
        out=out,
        init_from=start / "model",
        data=str(start / "chat.jsonl"),
        seq=48,
        batch=2,
        date="2026-11-27",
    )
    _, text = finetune.load_text(options, SMALL, setup.mesh_of(options, SMALL))
    loss = make_evaluator(pieces_of(SMALL), text.held_out)(
        load_params(exported, SMALL, "float32")
    )
    assert loss == pytest.approx(losses[best], abs=1e-5)


def test_held_out_rows_are_those_of_the_validations_own_split(
    start: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation"):
        turns = [
            {"role": "user", "content": split},
            {"role": "assistant", "content": "yes"},
        ]
        (folder / f"{split}.jsonl").write_text(json.dumps({"messages": turns}))
    options = FinetuneOptions(
        out=tmp_path / "tuned",
        init_from=str(start / "model"),
        data=f"hf:{folder}",
        validation=f"hf:{folder}",
    )
    train, held_out = finetune.read_conversations(options)
    assert [each.question for each in train] == ["train"]
    assert [each.question for each in held_out] == ["validation"]


def test_an_error_names_the_option_that_gave_the_conversation(
    start: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "held_out.jsonl"
    broken.write_text('{"messages": [{"role": "user", "content": "alone"}]}\n')
    options = FinetuneOptions(
        out=tmp_path / "tuned",
        init_from=str(start / "model"),
        data=str(start / "chat.jsonl"),
        validation=str(broken),
        seq=48,
        batch=2,
        date="2026-11-27",
    )
    with pytest.raises(UsageError, match=r"^--validation '.*held_out\.jsonl': .*:1"):
        finetune.load_text(options, SMALL, setup.mesh_of(options, SMALL))


@pytest.mark.slow  # Other tests have packing by layers, and int8.
def test_layerwise_int8_with_a_given_template(start: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    out = tmp_path / "tuned"
    more = ["--layerwise", "--weights", "int8", "--chat-template", str(template)]
    finetune.main(words(start, out, *SHORT, *FAST, *more, "--schedule", "linear"))
    rows = run_log.read_metrics(out)
    assert rows[-1]["val_loss"] < rows[2]["val_loss"]
    export.main(["--run", str(out), "--to", str(tmp_path / "exported"), "--best"])
    exported = tmp_path / "exported" / "chat_template.jinja"
    assert exported.read_text() == template.read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss-on", "user"], "--loss-on 'user' is unknown"),
        (["--too-long", "keep"], "--too-long 'keep' is unknown"),
        (["--warmup", "1"], "--warmup 1.0 is out of range; give a share from 0"),
        (["--epochs", "0"], "--epochs 0.0 is out of range; give a number above 0"),
        (["--steps", "-1"], "--steps -1 is out of range"),
        (
            ["--date", "today"],
            "--date 'today' is not a date; give one such as 2026-11-27",
        ),
        (["--batch", "64"], "--batch 64 needs as many rows, and --data fills"),
        (["--seq", "8", "--batch", "1"], "--seq 8 leaves nothing to learn"),
        (["--data", "chat.csv"], "--data 'chat.csv' does not exist; give a file"),
        (["--chat-template", "no.jinja"], "the chat template no.jinja cannot be read"),
        (["--init-from", "no"], "no"),
    ],
)
def test_rejects_bad_options_before_writing(
    more: list[str],
    message: str,
    start: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = words(start, folder / "tuned", *SHORT, *more)
    error = refused(args, capsys, finetune.main).splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (folder / "tuned").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("role", "chat.jsonl:1: message 1 has the unknown role 'bot'"),
        ("answer", "chat.jsonl:1: no message is the assistant's"),
        ("template", "line 1 of the chat template in "),
        ("vocabulary", "tokens and the model's vocabulary is 384"),
    ],
)
def test_rejects_bad_files_before_writing(
    edit: str,
    message: str,
    start: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(start, folder / "start")
    chat, model = folder / "start" / "chat.jsonl", folder / "start" / "model"
    if edit == "role":
        chat.write_text(json.dumps({"messages": [{"role": "bot", "content": "x"}]}))
    elif edit == "answer":
        turn = {"role": "user", "content": "x"}
        chat.write_text((json.dumps({"messages": [turn]}) + "\n") * 2)
    elif edit == "template":
        write_tokenizer(model, "{{ messages[0] ")
    else:
        tokenizer = chat_tokenizer()
        tokenizer.add_tokens([f"token{number}" for number in range(200)])
        tokenizer.save(str(model / "tokenizer.json"))
    args = words(folder / "start", folder / "tuned", *SHORT)
    if edit == "answer":
        args += ["--validation", str(start / "chat.jsonl")]
    error = refused(args, capsys, finetune.main)
    assert error.count("\n") == 1
    assert message in error
    assert not (folder / "tuned").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--vocab", "300"],
        ["--model", "tiny"],
        ["--text-field", "text"],
        ["--tokenizer", "x"],
        ["--data-tokens", "9"],
        ["--bos", "never"],
    ],
)
def test_rejects_options_of_pretraining_only(
    more: list[str], start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(words(start, tmp_path / "no", *more), capsys, finetune.main)
    assert more[0] in error


def test_another_day_does_not_change_a_run(start: Path, tmp_path: Path) -> None:
    options = FinetuneOptions(out=tmp_path, init_from=start, data="x")
    assert options.as_begun({"date": "2020-02-29"}).date == "2020-02-29"
    assert options.as_begun(None).date == options.as_begun({}).date
    given = FinetuneOptions(out=tmp_path, init_from=start, data="x", date="2021-01-01")
    assert given.as_begun({"date": "2020-02-29"}).date == "2021-01-01"


def test_learning_rates(small: LlamaConfig, tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        options = with_defaults(
            FinetuneOptions(out=tmp_path, init_from=tmp_path, data="x", optimizer=name),
            small,
        )
        assert options.lr == recipe.lr / 100
        assert options.lr_embeddings == RECIPES["adamw"].lr / 100
        # Pre-training that starts from good weights has the same rates.
        further = with_defaults(
            RunOptions(out=tmp_path, init_from=str(tmp_path), optimizer=name), small
        )
        names = ("lr", "lr_embeddings", "relative")
        assert all(getattr(further, n) == getattr(options, n) for n in names)
    shape: dict[str, Any] = {"out": tmp_path, "init_from": tmp_path, "data": "x"}
    assert FinetuneOptions(**shape, steps=10).warmup_steps == 1
    # The first step of a warmup has the rate 0, and nothing would be learned.
    assert FinetuneOptions(**shape, steps=1).warmup_steps == 0
    assert FinetuneOptions(**shape, steps=101).warmup_steps == 4
    assert FinetuneOptions(**shape, steps=101, warmup=0).warmup_steps == 0
    schedule = make_schedule(0.5, 100, 10, "linear")
    rates = [float(np.asarray(schedule(step))) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.275, 0.05])


def test_rejects_resuming_with_other_options(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop, pytest.MonkeyPatch.context() as patch:
        # The run ends before its first step, so nothing is trained.
        patch.setattr(setup, "initial_state", interrupted)
        options = FinetuneOptions(
            out=tmp_path / "tuned",
            init_from=start / "model",
            data=str(start / "chat.jsonl"),
            seq=48,
            batch=2,
            optimizer="adamw",
        )
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(options, stop)
    args = words(start, tmp_path / "tuned", *SHORT, "--optimizer", "adamw")
    assert "already holds a run (config.json)" in refused(args, capsys, finetune.main)
    more = ["--resume", "auto", "--loss-on", "all", "--warmup", "0.5"]
    error = refused([*args, *more], capsys, finetune.main)
    assert "loss_on: assistant -> all; warmup: 0.03 -> 0.5" in error


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt
