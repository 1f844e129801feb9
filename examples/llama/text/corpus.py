"""Text as tokens on disk, split by document into training and validation.

Each corpus is made once and kept in the user's cache directory, with its tokenizer. So
only the first run on a text has to read and tokenize it.
"""

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from examples.llama.run.errors import UsageError
from examples.llama.text.cache import cache_folder, publish
from examples.llama.text.hub import HubSource
from examples.llama.text.rows import FIELD, Document
from examples.llama.text.shards import ShardWriter, read_shards, write_tokens
from examples.llama.text.sources import Source, open_source
from examples.llama.text.split import TRAIN, VALIDATION, Labelled, split
from examples.llama.text.tokenizer import (
    PYTHON_TOKENIZER,
    PYTHON_VOCAB,
    SMALLEST_VOCAB,
    TOKENIZER_FILE,
    Encoder,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)

MANIFEST = "manifest.json"
# An evaluation takes `eval_windows` of them, 128 by default. C4 has far more text.
HUB_VALIDATION_TOKENS = 2**21
TOKENIZER_CHARS = 64 * 2**20  # A BPE barely changes with more text than this.
CACHE_FORMAT = 2  # Part of the cache key: raise it when the files under a key change.


class Corpus(NamedTuple):
    """Token ids in reading order and their tokenizer; `end_id` ends each document."""

    tokenizer: tokenizers.Tokenizer
    end_id: int
    prefix: tuple[int, ...]  # Before each document: BOS, where the tokenizer adds one.
    train: list[np.ndarray]  # Shards, 1-D and memory-mapped.
    validation: list[np.ndarray]
    key: str  # Changes when the tokens do.


def load_corpus(
    data: str,
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    tokenizer_option: str = "`tokenizer`",
    vocab: int | None = None,
    max_tokens: int | None = None,
    validation: str | None = None,
    text_field: str = FIELD,
    bos: str = "auto",
) -> Corpus:
    """Returns the corpus that `data` names, which is tokenized when it is first used.

    Args:
        data: see `sources.open_source`.
        vocab_size: the size of the model's vocabulary; every token id is below it.
        tokenizer: see `tokenizer.load_tokenizer`. By default a BPE is trained on
            `data`; for `python` there is one in this repository, which a vocabulary of
            its size or more takes.
        tokenizer_option: the name in errors of the option for `tokenizer`.
        vocab: tokens of that BPE, by default `vocab_size`.
        max_tokens: the number of tokens after which reading stops, at the end of a
            training document.
        validation: the held-out text, named like `data`. The default is the split
            `validation` of a data set of the hub, if there is one, and otherwise one
            document in twenty, chosen by a hash.
        text_field: the field with the text, in the rows of both texts.
        bos: "auto" puts before each document the tokens that `tokenizer` puts before a
            text. "never" puts nothing there.

    Raises:
        UsageError: if an argument does not give a corpus, or if the cache cannot be
            written.
    """
    given = f"{tokenizer_option} {tokenizer!r}" if tokenizer else None
    check_sizes(vocab_size, given, vocab, max_tokens)
    source = open_source("`data`", data, text_field)
    if (
        data == "python"
        and not tokenizer
        and vocab is None
        and vocab_size >= PYTHON_VOCAB
    ):
        tokenizer = str(PYTHON_TOKENIZER)
    held_out = (
        open_source("`validation`", validation, text_field) if validation else None
    )
    if text_field != FIELD and not any(s.has_rows() for s in (source, held_out) if s):
        raise UsageError(
            f"`text_field` {text_field!r} is for rows, and the files of `data` "
            f"{data!r} have none; leave it out"
        )
    encoder = (
        load_tokenizer(tokenizer, vocab_size, tokenizer_option) if tokenizer else None
    )
    if encoder and bos == "never":
        encoder = encoder._replace(prefix=())
    vocab = vocab or vocab_size
    try:
        content = (
            CACHE_FORMAT,
            tokenizers.__version__,
            max_tokens,
            encoder.identity() if encoder else vocab,
            source.fingerprint(),
            held_out and held_out.fingerprint(),
        )
        key = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        name = re.sub(r"[^a-zA-Z0-9]+", "-", data)[-40:].strip("-")
        folder = cache_folder() / f"{name}-{key}"
        if not folder.exists():
            build(folder, data, source, held_out, encoder or vocab, max_tokens)
        return read_corpus(folder)
    except OSError as error:  # What the sources raise, they report themselves.
        raise UsageError(
            f"the corpus cannot be kept in {cache_folder()} ({error}); free disk space "
            "there, or set XDG_CACHE_HOME to another folder"
        ) from error


def check_sizes(
    vocab_size: int, tokenizer: str | None, vocab: int | None, max_tokens: int | None
) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(
            f"`data_tokens` {max_tokens} is out of range; give a number above 0"
        )
    if vocab is not None and tokenizer:
        raise UsageError(
            f"`vocab` {vocab} is for a tokenizer trained here, and {tokenizer} gives "
            "one; leave one of them out"
        )
    if not tokenizer and vocab_size < SMALLEST_VOCAB:
        raise UsageError(
            f"`model` has a vocabulary of {vocab_size}, too small for every byte and "
            f"an end; give one with {SMALLEST_VOCAB} or more, or a `tokenizer`"
        )
    if vocab is not None and not SMALLEST_VOCAB <= vocab <= vocab_size:
        raise UsageError(
            f"`vocab` {vocab} is out of range; give {SMALLEST_VOCAB} (every byte and "
            f"an end) to {vocab_size} (the model's vocabulary)"
        )


def read_corpus(folder: Path) -> Corpus:
    manifest = json.loads((folder / MANIFEST).read_text())
    return Corpus(
        read_tokenizer(folder / TOKENIZER_FILE),
        manifest["end_id"],
        tuple(manifest.get("prefix", ())),  # Caches that are older have none.
        read_shards(folder, TRAIN),
        read_shards(folder, VALIDATION),
        manifest["key"],
    )


def build(
    folder: Path,
    data: str,
    source: Source,
    held_out: Source | None,
    encoder: Encoder | int,
    max_tokens: int | None,
) -> None:
    """Writes the tokens and the tokenizer to `folder`, completely or not at all.

    Args:
        folder: a folder that does not exist yet.
        data: the user's name for `source`.
        source: the source of the training documents, and also of the held-out ones if
            `held_out` is None.
        held_out: the source of the validation documents.
        encoder: the tokenizer, or the vocabulary of the BPE to train.
        max_tokens: see `load_corpus`.
    """
    validation_source = held_out or source
    validation = validation_source.held_out() or held_out
    if not isinstance(encoder, Encoder):
        texts = (
            document.text
            for label, document in training(source, validation, data)
            if label == TRAIN
        )
        encoder = train_tokenizer(first_chars(texts, TOKENIZER_CHARS), encoder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        built = Path(temporary) / folder.name
        built.mkdir()
        limit = (
            HUB_VALIDATION_TOKENS if isinstance(validation_source, HubSource) else None
        )
        writers = {
            TRAIN: ShardWriter(built, TRAIN, encoder.vocab_size, max_tokens),
            VALIDATION: ShardWriter(built, VALIDATION, encoder.vocab_size, limit),
        }
        tokenise(
            training(source, validation, data), validation, encoder, writers, max_tokens
        )
        for read in (source, validation_source):
            read.say_skipped()
        encoder.tokenizer.save(str(built / TOKENIZER_FILE))
        digests = b"".join(writer.digest.digest() for writer in writers.values())
        manifest = {
            "source": data,
            "documents": {label: writer.documents for label, writer in writers.items()},
            "tokens": {label: writer.tokens for label, writer in writers.items()},
            "end_id": encoder.end_id,
            "prefix": encoder.prefix,
            "key": hashlib.sha256(digests).hexdigest()[:16],
            "versions": {"format": CACHE_FORMAT, "tokenizers": tokenizers.__version__},
        }
        (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        publish(built, folder)


def training(
    source: Source, validation: Iterable[Document] | None, data: str
) -> Iterator[Labelled]:
    """Yields the documents of `source` with their splits.

    All documents are for training if there is another text for validation.
    """
    return (
        split(source, data)
        if validation is None
        else ((TRAIN, document) for document in source)
    )


def tokenise(
    training: Iterable[Labelled],
    validation: Iterable[Document] | None,
    encoder: Encoder,
    writers: dict[str, ShardWriter],
    max_tokens: int | None,
) -> None:
    # The bar shows only where this takes long, and only to a person.
    with tqdm(
        total=max_tokens,
        desc="tokenising",
        unit="token",
        unit_scale=True,
        delay=2,
        disable=None,
    ) as bar:
        write = functools.partial(
            write_tokens, encoder=encoder, writers=writers, bar=bar
        )
        train, held_out = writers[TRAIN], writers[VALIDATION]
        if validation is None:
            write(training, until=lambda: train.full and held_out.documents > 0)
        else:
            write(training, until=lambda: train.full)
            write(
                ((VALIDATION, document) for document in validation),
                until=lambda: held_out.full,
            )
    for writer in writers.values():
        writer.close()


def first_chars(texts: Iterable[str], count: int) -> Iterator[str]:
    """Yields texts until there are `count` characters."""
    for text in texts:
        yield text
        count -= len(text)
        if count <= 0:
            return
