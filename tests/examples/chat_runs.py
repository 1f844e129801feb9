"""What tests of the fine-tuning command share: a start, and its command lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.llama.hf.weights import save_pretrained
from examples.llama.model import init_params
from examples.llama.run import log as run_log
from tests.examples.chat_models import CHATML, EOS, chat_tokenizer, write_tokenizer
from tests.examples.conftest import SMALL

ANSWER = "Red and blue."
SHORT = ["--seq", "48", "--batch", "2", "--eval-every", "3"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and 40 conversations; nothing may be written to it."""
    folder = tmp_path_factory.mktemp("start")
    save_pretrained(
        init_params(SMALL, seed=0),
        SMALL,
        folder / "model",
        tokenizer=chat_tokenizer(),
        end_token=EOS,
    )
    write_tokenizer(folder / "model", CHATML.replace("You help.", ""))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": ANSWER},
            ]
        }
        for number in range(40)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(start: Path, out: Path, *more: str) -> list[str]:
    data = str(start / "chat.jsonl")
    return [
        "--init-from",
        str(start / "model"),
        "--data",
        data,
        "--out",
        str(out),
        *more,
    ]


def without_times(out: Path) -> list[dict[str, Any]]:
    rows = run_log.read_metrics(out)
    return [{k: x for k, x in row.items() if k != "tokens_per_s"} for row in rows]


def refused(
    args: list[str], capsys: pytest.CaptureFixture[str], main: Callable[..., None]
) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    return capsys.readouterr().err
