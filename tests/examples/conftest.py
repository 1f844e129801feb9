from pathlib import Path

import pytest

from examples.llama import config
from examples.llama.text import sources

SMALL = config.LlamaConfig(
    vocab_size=384,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_layers=3,
    max_seq_len=128,
)


@pytest.fixture(scope="module", autouse=True)
def quick_examples(quick_compilation: None) -> None:
    """Compiles all examples alike, so that the tests can compare their runs."""


@pytest.fixture
def small() -> config.LlamaConfig:
    """A shape that compiles fast, with sides that differ, so that swapped axes show."""
    return SMALL


@pytest.fixture
def tiny_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.PRESETS, "tiny", SMALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a new cache."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a standard library of 40 short files; the cache is new too."""
    folder = tmp_path / "stdlib"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "skipped.py").write_text("skipped = True\n")
    for number in range(40):
        lines = [
            f"def f{line}(x):\n    return x + {number * line}\n" for line in range(20)
        ]
        (folder / f"module{number}.py").write_text("\n".join(lines))
    monkeypatch.setattr(sources, "stdlib_folder", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def out(stdlib: Path, tiny_is_small: None, tmp_path: Path) -> Path:
    """The path of a run's folder, which does not exist yet."""
    return tmp_path / "runs" / "one"
