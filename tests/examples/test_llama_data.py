import itertools
from pathlib import Path

import numpy as np
import pytest

from examples.llama import corpus, data
from examples.llama.usage import UsageError

TOKENS = np.arange(1000, dtype=np.uint16)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_documents_are_sorted_and_tests_skipped(stdlib: Path) -> None:
    names = [document.name for document in corpus.read_stdlib()]
    assert names == sorted(names)
    assert len(names) == 40
    assert "module0.py" in names


def test_the_real_stdlib_is_read() -> None:
    names = {document.name for document in corpus.read_stdlib()}
    assert {"json/decoder.py", "dataclasses.py"} <= names
    assert not any("site-packages" in name for name in names)


def test_corpus_splits_by_document(stdlib: Path) -> None:
    built = corpus.load_corpus("stdlib", 384)
    texts = dict(corpus.read_stdlib())
    held_out = {name for name in texts if corpus.in_validation(name)}
    assert 0 < len(held_out) < 10

    def documents(tokens: np.ndarray) -> set[str]:
        ends = np.flatnonzero(tokens == built.tokenizer.token_to_id(corpus.END))
        rows = np.split(tokens, ends + 1)
        assert rows[-1].size == 0  # The last document ends with END too.
        return {built.tokenizer.decode(row[:-1].tolist()) for row in rows[:-1]}

    assert documents(built.validation_tokens) == {texts[name] for name in held_out}
    assert documents(built.train_tokens) == {texts[n] for n in texts if n not in held_out}


def test_more_documents_move_none_between_the_splits(stdlib: Path) -> None:
    before = {n: corpus.in_validation(n) for n, _ in corpus.read_stdlib()}
    (stdlib / "added.py").write_text("x = 1\n")
    after = {n: corpus.in_validation(n) for n, _ in corpus.read_stdlib()}
    assert before.items() <= after.items()


def test_tokenizer_round_trip(stdlib: Path) -> None:
    tokenizer = corpus.load_corpus("stdlib", 384).tokenizer
    text = "def spam(x):\n\treturn 'grüße 🚀' + x  # two  spaces\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 384


def test_tokens_fit_their_type(stdlib: Path) -> None:
    built = corpus.load_corpus("stdlib", 384)
    assert built.train_tokens.dtype == np.uint16
    assert built.train_tokens.max() < 384


def test_second_load_hits_the_cache(stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus.load_corpus("stdlib", 384)
    monkeypatch.setattr(corpus, "build", lambda *_: pytest.fail("built twice"))
    second = corpus.load_corpus("stdlib", 384)
    np.testing.assert_array_equal(first.train_tokens, second.train_tokens)
    (folder,) = (tmp_path / "cache" / "apollo_optax").iterdir()  # No temporary one is left over.
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.json",
        "train.npy",
        "validation.npy",
    }


def test_build_is_deterministic(stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.load_corpus("stdlib", 384)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    corpus.load_corpus("stdlib", 384)
    assert files(tmp_path / "cache") == files(tmp_path / "other")


def test_changed_text_and_vocabulary_miss_the_cache(stdlib: Path, tmp_path: Path) -> None:
    corpus.load_corpus("stdlib", 384)
    corpus.load_corpus("stdlib", 300)
    (stdlib / "module0.py").write_text("changed = 1\n")
    corpus.load_corpus("stdlib", 384)
    assert len(list((tmp_path / "cache" / "apollo_optax").iterdir())) == 3


def test_losing_the_race_to_build_is_harmless(stdlib: Path, tmp_path: Path) -> None:
    winner, loser = tmp_path / "winner", tmp_path / "loser"
    for folder, content in ((winner, "first"), (loser, "second")):
        folder.mkdir()
        (folder / "train.npy").write_text(content)
    corpus.publish(loser, winner)
    assert (winner / "train.npy").read_text() == "first"
    assert not loser.exists()


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    with pytest.raises(FileNotFoundError):
        corpus.publish(tmp_path / "built", tmp_path / "missing" / "folder")


def test_a_corpus_without_validation_documents_is_refused(stdlib: Path, tmp_path: Path) -> None:
    for path in stdlib.glob("*.py"):
        if corpus.in_validation(path.name):
            path.unlink()
    with pytest.raises(UsageError, match="and 0 validation documents"):
        corpus.load_corpus("stdlib", 384)
    assert not (tmp_path / "cache").exists()


def test_unknown_source_is_refused() -> None:
    with pytest.raises(UsageError, match="--data 'c4' is unknown; choose one of: stdlib"):
        corpus.load_corpus("c4", 384)


def test_windows_overlap_by_one_token() -> None:
    windows = data.Windows(np.arange(13), 4)
    assert [windows[i].tolist() for i in range(len(windows))] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
    ]
    assert len(data.Windows(np.arange(12), 4)) == 2


def first_batches(seed: int, count: int = 5) -> np.ndarray:
    batches = data.train_batches(TOKENS, seq=9, batch=4, seed=seed)
    return np.stack(list(itertools.islice(batches, count)))


def test_batches_follow_the_seed_alone() -> None:
    assert first_batches(0).shape == (5, 4, 10)
    np.testing.assert_array_equal(first_batches(0), first_batches(0))
    assert not np.array_equal(first_batches(0), first_batches(1))


def test_an_epoch_has_every_window_once_and_the_next_another_order() -> None:
    windows_per_epoch = 999 // 9  # 111, an odd number of batches of 3.
    batches = data.train_batches(TOKENS, seq=9, batch=3, seed=0)
    starts = np.stack(list(itertools.islice(batches, 2 * windows_per_epoch // 3)))[:, :, 0]
    first, second = starts.reshape(2, -1)
    assert sorted(first) == sorted(second) == list(range(0, 999, 9))
    assert first.tolist() != second.tolist()


def test_validation_windows_are_spread_and_fixed() -> None:
    batches_KxBxS = data.validation_batches(np.arange(100_000), seq=10)
    assert batches_KxBxS.shape == (16, 8, 11)
    assert batches_KxBxS[0, 0, 0] == 0
    assert batches_KxBxS[-1, -1, -1] > 99_900
    assert data.validation_batches(np.arange(50), seq=10).shape == (1, 4, 11)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="--batch 4 of --seq 300 needs 1201 training tokens"):
        data.train_batches(TOKENS, seq=300, batch=4, seed=0)
    with pytest.raises(UsageError, match="--seq 1000 is longer than the 1000 validation tokens"):
        data.validation_batches(TOKENS, seq=1000)
