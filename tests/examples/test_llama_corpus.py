import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import tokenizers

from examples.llama.run.errors import UsageError
from examples.llama.text import cache, corpus, shards, sources, tokenizer
from examples.llama.text.rows import Document
from examples.llama.text.split import TRAIN, VALIDATION, in_validation, split


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder with 40 short texts in `corpus`, and a new cache in `cache`."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(
            f"text {number} of some spam and eggs\n" * 5
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def load(data: str = "corpus", **settings: object) -> corpus.Corpus:
    return corpus.load_corpus(data, **{"vocab_size": 384} | settings)


def texts(built: corpus.Corpus, rows: list[np.ndarray]) -> list[str]:
    """Returns the decoded documents of a split."""
    tokens = np.concatenate(rows)
    ends = np.flatnonzero(tokens == built.end_id) + 1
    *documents, rest = np.split(tokens, ends)
    assert rest.size == 0  # The last document ends with `end_id` too.
    return [built.tokenizer.decode(document[:-1].tolist()) for document in documents]


def built_folders() -> list[Path]:
    found = (Path("cache") / "apollo_optax").iterdir()
    return [path for path in found if path.name != "digests"]


def content(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def json_lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_hub_dataset(train: int, validation: int) -> None:
    Path("hub").mkdir()
    config = "configs:\n- config_name: en\n  data_files:\n  - {split: train, path: train.json.gz}\n"
    Path("hub/train.json.gz").write_bytes(
        gzip.compress(json_lines(*(f"train {row} spam" for row in range(train))))
    )
    if validation:
        config += "  - {split: validation, path: validation.json.gz}\n"
        rows = json_lines(*(f"held out {row}" for row in range(validation)))
        Path("hub/validation.json.gz").write_bytes(gzip.compress(rows))
    Path("hub/README.md").write_text(f"---\n{config}---\n")


def fail(*_: object, **__: object) -> NoReturn:
    pytest.fail("done twice")


# The split.


def test_corpus_splits_by_document(stdlib: Path) -> None:
    built = load("stdlib")
    by_name = dict(sources.open_source("`data`", "stdlib"))
    held_out = [name for name in by_name if in_validation(name)]
    assert 0 < len(held_out) < 10
    assert texts(built, built.validation) == [by_name[name] for name in held_out]
    assert texts(built, built.train) == [
        by_name[name] for name in by_name if name not in held_out
    ]


def test_added_documents_move_no_other_between_the_splits() -> None:
    before = set(split(sources.open_source("`data`", "corpus"), "corpus"))
    Path("corpus/added.txt").write_text("added\n")
    assert before < set(split(sources.open_source("`data`", "corpus"), "corpus"))


def test_a_twentieth_is_held_out() -> None:
    labels = [
        label for label, _ in split((Document(str(n), "") for n in range(2000)), "x")
    ]
    assert 70 < labels.count(VALIDATION) < 130


@pytest.mark.parametrize("held_out", [True, False])
def test_of_two_documents_each_split_gets_one(held_out: bool) -> None:
    names = [name for name in map(str, range(1000)) if in_validation(name) == held_out][
        :3
    ]
    for count in (2, 3):
        labelled = list(split((Document(name, "") for name in names[:count]), "x"))
        assert [document.name for _, document in labelled] == names[:count]
        moved = TRAIN if held_out else VALIDATION
        assert [label for label, _ in labelled].count(moved) == 1


def test_a_document_and_its_repetition_are_in_the_same_split() -> None:
    names = [name for name in map(str, range(1000)) if not in_validation(name)][:2]
    for repeated in names:
        documents = [Document(name, "") for name in (*names, repeated)]
        labels = {TRAIN: set[str](), VALIDATION: set[str]()}
        for label, document in split(documents, "x"):
            labels[label].add(document.name)
        assert sorted(map(len, labels.values())) == [1, 1]
    with pytest.raises(UsageError, match="has 1 document, repetitions aside"):
        list(split([Document(names[0], "")] * 3, "x"))


def test_the_split_reads_only_as_far_as_needed() -> None:
    endless = (Document(str(number), "") for number in itertools.count())
    assert len(list(itertools.islice(split(endless, "x"), 1000))) == 1000


def test_rejects_one_document_without_validation() -> None:
    message = r"`data` 'corpus/1.txt' has 1 document, .*; add documents .*, or give `validation`"
    with pytest.raises(UsageError, match=message):
        load("corpus/1.txt")
    assert built_folders() == []
    built = load("corpus/1.txt", validation="corpus/2.txt")
    assert texts(built, built.train) == [Path("corpus/1.txt").read_text()]
    assert texts(built, built.validation) == [Path("corpus/2.txt").read_text()]


def test_a_long_text_in_one_file_is_split() -> None:
    paragraphs = [f"paragraph {number} with spam\n\n" for number in range(5000)]
    Path("book.txt").write_text("".join(paragraphs))
    built = load("book.txt")
    train, validation = texts(built, built.train), texts(built, built.validation)
    assert len(train) + len(validation) == 7
    assert validation
    assert sorted("".join(train + validation).split("\n\n")) == sorted(
        "".join(paragraphs).split("\n\n")
    )


def test_given_validation_takes_none_of_the_training_documents() -> None:
    Path("held.jsonl").write_bytes(json_lines("held", "out"))
    built = load(validation="held.jsonl")
    assert texts(built, built.validation) == ["held", "out"]
    assert len(texts(built, built.train)) == 40


def test_errors_name_the_option_whose_value_is_wrong() -> None:
    with pytest.raises(
        UsageError, match="`validation` 'std' is unknown; choose one of: stdlib"
    ):
        load(validation="std")
    Path("held.jsonl").write_text("{}")
    with pytest.raises(
        UsageError, match="`validation` 'held.jsonl': held.jsonl:1 has no string called"
    ):
        load(validation="held.jsonl")
    assert built_folders() == []


# Hub data sets.


def test_hub_dataset_validates_on_its_own_split() -> None:
    write_hub_dataset(train=300, validation=20)
    built = load("hf:./hub/en")
    assert texts(built, built.train) == [f"train {row} spam" for row in range(300)]
    assert texts(built, built.validation) == [f"held out {row}" for row in range(20)]
    # `validation` may name a hub data set too, and reads the same split of it.
    built = load(validation="hf:./hub/en")
    assert len(texts(built, built.train)) == 40
    assert texts(built, built.validation) == [f"held out {row}" for row in range(20)]


def test_hub_dataset_without_a_validation_split_is_split() -> None:
    write_hub_dataset(train=300, validation=0)
    built = load("hf:./hub/en")
    found = texts(built, built.train) + texts(built, built.validation)
    assert sorted(found) == sorted(f"train {row} spam" for row in range(300))
    assert len(texts(built, built.validation)) > 1


def test_hub_validation_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub_dataset(train=30, validation=200)
    monkeypatch.setattr(corpus, "HUB_VALIDATION_TOKENS", 100)
    built = load("hf:./hub/en")
    last = texts(built, built.validation)[-1]
    assert (
        100
        <= sum(map(len, built.validation))
        <= 100 + len(built.tokenizer.encode(last).ids)
    )


def test_a_cached_hub_corpus_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub_dataset(train=30, validation=2)
    first = load("hf:./hub/en")
    monkeypatch.setattr("datasets.load_dataset", fail)
    assert load("hf:./hub/en").key == first.key


# Tokens and their limits.


def test_max_tokens_ends_with_the_document_that_reaches_them() -> None:
    everything = load()
    some = load(max_tokens=100)
    documents = texts(some, some.train)
    assert documents == texts(everything, everything.train)[: len(documents)]
    tokens = np.concatenate(some.train)
    assert 100 <= tokens.size < 100 + (tokens.size / len(documents)) * 2
    assert texts(some, some.validation)
    assert load(max_tokens=10**9).key == everything.key


@pytest.mark.parametrize("validation", [None, "corpus/1.txt"])
def test_max_tokens_stops_reading(
    monkeypatch: pytest.MonkeyPatch, validation: str | None, folder: Path
) -> None:
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        for read in itertools.count():
            yield Document(str(read), "spam and eggs\n" * 100)

    monkeypatch.setattr(sources.FileSource, "__iter__", lambda _: endless())
    monkeypatch.setattr(corpus, "TOKENIZER_CHARS", 10_000)
    monkeypatch.setattr(corpus, "HUB_VALIDATION_TOKENS", 100)
    if validation:
        write_hub_dataset(train=1, validation=5)
        validation = "hf:./hub/en"
    built = load(max_tokens=5000, validation=validation)
    assert 5000 <= sum(map(len, built.train)) < 6000
    assert read < 2000


def test_sizes_of_batches_and_shards_change_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = load(max_tokens=700)
    monkeypatch.setenv("XDG_CACHE_HOME", "other")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 3)
    cut = load(max_tokens=700)
    assert len(whole.train) == 1
    assert [shard.size for shard in cut.train[:-1]] == [100] * (len(cut.train) - 1)
    assert len(cut.train) >= 7
    np.testing.assert_array_equal(
        np.concatenate(whole.train), np.concatenate(cut.train)
    )
    np.testing.assert_array_equal(
        np.concatenate(whole.validation), np.concatenate(cut.validation)
    )
    assert whole.key == cut.key


def test_no_empty_shard_follows_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 4)
    writer = shards.ShardWriter(tmp_path, "train", 2**16)
    writer.add(np.arange(6, dtype=np.uint32))
    writer.add(np.arange(2, dtype=np.uint32))
    writer.close()
    assert [shard.tolist() for shard in shards.read_shards(tmp_path, "train")] == [
        [0, 1, 2, 3],
        [4, 5, 0, 1],
    ]


def test_tokens_are_memory_mapped_in_the_smallest_dtype(tmp_path: Path) -> None:
    built = load()
    assert isinstance(built.train[0], np.memmap)
    assert built.train[0].dtype == np.uint16
    assert built.train[0].max() < 384
    for vocab_size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        writer = shards.ShardWriter(tmp_path, str(vocab_size), vocab_size)
        writer.add(np.array([vocab_size - 1], np.uint32))
        writer.close()
        (shard,) = shards.read_shards(tmp_path, str(vocab_size))
        assert shard.dtype == dtype
        assert shard.tolist() == [vocab_size - 1]


def test_vocab_bounds_the_trained_tokenizer() -> None:
    assert load(vocab=300).tokenizer.get_vocab_size() == 300
    assert load().tokenizer.get_vocab_size() > 300


def test_given_tokenizer_makes_the_tokens() -> None:
    given = load(vocab=300)
    given.tokenizer.save("tokenizer.json")
    built = load("corpus/*.txt", tokenizer="tokenizer.json", vocab_size=300)
    np.testing.assert_array_equal(
        np.concatenate(built.train), np.concatenate(given.train)
    )
    assert built.key == given.key
    with pytest.raises(
        UsageError, match="has 300 tokens and the model's vocabulary is 299"
    ):
        load(tokenizer="tokenizer.json", vocab_size=299)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vocab": 256},
            r"`vocab` 256 is out of range; give 257 .* to 384 \(the model's vocabulary\)",
        ),
        ({"vocab": 385}, "`vocab` 385 is out of range; give 257"),
        (
            {"vocab_size": 100},
            "`model` has a vocabulary of 100, too small .* give one with 257 or more",
        ),
        (
            {"vocab": 300, "tokenizer": "x"},
            "`vocab` 300 is for a tokenizer trained here, and `tokenizer` 'x'",
        ),
        ({"max_tokens": 0}, "`data_tokens` 0 is out of range; give a number above 0"),
    ],
)
def test_rejects_sizes_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(**settings)


def write_chat_tokenizer() -> tokenizers.Tokenizer:
    """Writes a tokenizer that puts <s> before a text, as those of chat models do."""
    given = load(vocab=300).tokenizer
    given.add_special_tokens(["<s>"])
    given.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", given.token_to_id("<s>"))]
    )
    given.save("tokenizer.json")
    return given


def test_bos_precedes_each_document_once() -> None:
    bos = write_chat_tokenizer().token_to_id("<s>")
    built = load(tokenizer="tokenizer.json")
    for rows in (built.train, built.validation):
        tokens = np.concatenate(rows)
        starts = np.flatnonzero(tokens == bos)
        ends = np.flatnonzero(tokens == built.end_id)
        assert starts.tolist() == [0, *(ends[:-1] + 1)]
    assert built.prefix == (bos,)
    # The same corpus comes out of the cache.
    assert load(tokenizer="tokenizer.json").prefix == (bos,)


def test_bos_never_is_a_corpus_of_its_own() -> None:
    bos = write_chat_tokenizer().token_to_id("<s>")
    built = [load(tokenizer="tokenizer.json", bos=bos) for bos in ("auto", "never")]
    assert built[1].prefix == ()
    assert bos not in np.concatenate(built[1].train)
    assert built[0].key != built[1].key
    # A cache that is older than the option has the same tokens, and is found.
    folders = built_folders()
    for manifest in Path("cache").rglob("manifest.json"):
        fields = json.loads(manifest.read_text())
        if not fields["prefix"]:
            del fields["prefix"]
        manifest.write_text(json.dumps(fields))
    again = load(tokenizer="tokenizer.json", bos="never")
    assert (again.key, again.prefix) == (built[1].key, ())
    assert built_folders() == folders


# The cache.


def test_second_load_reads_no_document_and_trains_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = load()
    monkeypatch.setattr(sources.FileSource, "__iter__", fail)
    monkeypatch.setattr(corpus, "train_tokenizer", fail)
    second = load()
    np.testing.assert_array_equal(first.train[0], second.train[0])
    assert first.key == second.key
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    (built,) = built_folders()  # No temporary folder is left.
    assert {path.name for path in built.iterdir()} == {
        "manifest.json",
        "tokenizer.json",
        "train-00000.npy",
        "validation-00000.npy",
    }


def test_manifest_describes_the_corpus() -> None:
    built = load()
    (folder,) = built_folders()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "corpus"
    assert manifest["tokens"] == {
        "train": built.train[0].size,
        "validation": built.validation[0].size,
    }
    assert manifest["documents"] == {
        "train": len(texts(built, built.train)),
        "validation": len(texts(built, built.validation)),
    }
    assert manifest["key"] == built.key
    assert set(manifest["versions"]) == {"format", "tokenizers"}


def test_build_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    (first,) = built_folders()
    monkeypatch.setenv("XDG_CACHE_HOME", "other")
    load()
    assert content(first) == content(Path("other") / "apollo_optax" / first.name)


def test_what_changes_the_tokens_changes_cache_and_key() -> None:
    keys = {
        load().key,
        load(vocab_size=300).key,
        load(max_tokens=100).key,
        load(validation="corpus/1.txt").key,
    }
    Path("corpus/0.txt").write_text("changed\n")
    keys.add(load().key)
    assert len(keys) == len(built_folders()) == 5


def test_two_processes_may_build_the_same_corpus(tmp_path: Path) -> None:
    winner, loser = tmp_path / "winner", tmp_path / "loser"
    for folder, text in ((winner, "first"), (loser, "second")):
        folder.mkdir()
        (folder / "train.npy").write_text(text)
    cache.publish(loser, winner)
    assert (winner / "train.npy").read_text() == "first"
    assert not loser.exists()


def test_a_folder_that_cannot_be_published_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    with pytest.raises(FileNotFoundError):
        cache.publish(tmp_path / "built", tmp_path / "missing" / "folder")


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(path: Path, tokens: np.ndarray) -> None:
        path.write_bytes(tokens.tobytes()[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(
            UsageError,
            match="kept in .*No space left .*; free disk space there, or set XDG",
        ):
            load()
    assert built_folders() == []
    assert load().train


def test_rejects_a_file_as_cache_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    with pytest.raises(
        UsageError, match="cannot be kept in file/apollo_optax .*XDG_CACHE_HOME"
    ):
        load()


def test_rejects_an_unknown_source() -> None:
    with pytest.raises(
        UsageError, match="`data` 'c4' is unknown; choose one of: package-docs, stdlib"
    ):
        load("c4")


def test_tokenizer_is_trained_on_a_prefix_of_the_training_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    train = tokenizer.train_tokenizer

    def spy(texts: Iterator[str], vocab_size: int) -> tokenizer.Encoder:
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(corpus, "train_tokenizer", spy)
    monkeypatch.setattr(corpus, "TOKENIZER_CHARS", 500)
    built = load()
    assert seen == texts(built, built.train)[: len(seen)]
    assert 500 <= sum(map(len, seen)) < 500 + len(seen[-1])


def test_python_comes_with_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used if the vocabulary has room for it and no other is asked for."""
    monkeypatch.setattr(sources, "stdlib_folder", lambda: Path("corpus"))
    monkeypatch.setattr(sources, "site_folders", lambda: {"purelib": Path("packages")})
    for number in range(40):
        Path(f"corpus/{number}.py").write_text(
            f"def function_{number}(x):\n    return x + {number}\n"
        )
    built = load("python", vocab_size=32_000)
    assert built.tokenizer.get_vocab_size() == tokenizer.PYTHON_VOCAB
    assert built.end_id == 0
    assert texts(built, built.train)[0].startswith("def function_")
    assert load("python", vocab_size=384).tokenizer.get_vocab_size() <= 384
    assert (
        load("python", vocab_size=32_000, vocab=300).tokenizer.get_vocab_size() <= 300
    )
