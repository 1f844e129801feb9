"""Messages name options by their fields; the commands print them as flags."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from examples import llama
from examples.llama.export import ExportOptions
from examples.llama.memory.options import PlanOptions
from examples.llama.options import FinetuneOptions, RunOptions
from examples.llama.run.errors import (
    RESUME,
    RunInterrupted,
    UsageError,
    exit_on_usage_error,
    first_line,
    notice,
    with_flags,
)

FOLDER = Path(llama.__file__).parent
# Modules that define, parse or check a command line, and the one that prints flags.
WITH_FLAGS = (
    "compare",
    "export",
    "finetune",
    "plan",
    "pretrain",
    "tokenise",
    "options",
    "memory/options",
    "memory/report",
    "run/errors",
)
LIBRARY = {
    str(path.relative_to(FOLDER).with_suffix("")): path
    for path in sorted(FOLDER.rglob("*.py"))
    if str(path.relative_to(FOLDER).with_suffix("")) not in WITH_FLAGS
}
OPTIONS = (RunOptions, FinetuneOptions, ExportOptions, PlanOptions)
FIELDS = {field.name for kind in OPTIONS for field in dataclasses.fields(kind)}


def texts_of(path: Path) -> list[str]:
    """Returns the strings of a module that are not docstrings, with f-strings' text."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    statements = [node.value for node in nodes if isinstance(node, ast.Expr)]
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node not in statements
    ]


def test_a_field_is_printed_as_its_flag() -> None:
    message = "`eval_every` 0, `b2` 1 in `data` 'x=`y z`' need `hf auth login`"
    shown = "--eval-every 0, --b2 1 in --data 'x=`y z`' need `hf auth login`"
    assert with_flags(message) == shown


def test_names_in_the_errors_of_libraries_are_no_fields() -> None:
    assert first_line(ValueError("`data` is bad\nmore")) == "'data' is bad"


def test_commands_print_flags(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UsageError("`batch` 7 is odd")

    def stop() -> None:
        raise RunInterrupted("`resume` auto goes on")

    with pytest.raises(SystemExit):
        exit_on_usage_error(fail)
    exit_on_usage_error(stop)
    notice("`out` holds a run with ", quoted="`len` of `x`")
    out, err = capsys.readouterr()
    assert out == "--resume auto goes on\n"
    assert err == "error: --batch 7 is odd\n--out holds a run with `len` of `x`\n"


@pytest.mark.parametrize(
    ("after", "line"),
    [("", "interrupted"), (RESUME, f"interrupted; {with_flags(RESUME)}")],
)
def test_ctrl_c_names_what_the_command_can_do(
    after: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        exit_on_usage_error(interrupted, after_interrupt=after)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_knows_no_flags_but_fields(name: str) -> None:
    for text in texts_of(LIBRARY[name]):
        ours = text.replace("jupyter nbconvert --to", "")
        assert not re.search(r"(^|[ (`'])--[a-z]", ours)
        assert set(re.findall("`([a-z][a-z0-9_]*)`", text)) <= FIELDS
