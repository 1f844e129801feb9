"""Real text without a network, as tokens: the source of Python's own standard library.

The documents of a corpus are split into training and validation by a hash of their name, a
byte-level BPE is trained on the training documents, and the tokens are kept under the user's cache
directory, so only the first run pays for them.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from examples.llama.usage import UsageError, unknown_name

END = "<|end|>"  # Follows every document, so that no window mistakes one for its successor.
VALIDATION_SHARE = 1 / 20
# Installed packages differ between machines, tests and tables are copies of one another, and
# pydoc_data is one English text so long that whichever split it falls into would be about it.
SKIPPED_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"),
        "pydoc_data",
    )
)
CACHE_FORMAT = 1  # Part of the cache key: raise it when the files under a key change.


class Document(NamedTuple):
    name: str
    text: str


class Corpus(NamedTuple):
    """Token ids in reading order, documents ended by `END`, with the tokenizer that made them."""

    tokenizer: tokenizers.Tokenizer
    train_tokens: np.ndarray
    validation_tokens: np.ndarray


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def read_stdlib() -> list[Document]:
    """Returns the `.py` files of the running Python's standard library, sorted by path."""
    folder = stdlib_folder()
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    kept = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.parts)]
    # A few files declare another encoding; a replacement character in a comment does no harm.
    return [Document(path.as_posix(), (folder / path).read_text("utf-8", errors="replace")) for path in kept]


SOURCES: dict[str, Callable[[], list[Document]]] = {"stdlib": read_stdlib}


def load_corpus(source: str, vocab_size: int) -> Corpus:
    """Returns the corpus called `source`, cut into at most `vocab_size` kinds of token."""
    if source not in SOURCES:
        raise unknown_name("--data", source, SOURCES)
    documents = SOURCES[source]()
    folder = cache_folder() / f"{source}-{content_key(documents, vocab_size)}"
    if not folder.exists():
        build(documents, vocab_size, folder)
    return Corpus(
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
        np.load(folder / "train.npy", mmap_mode="r"),
        np.load(folder / "validation.npy", mmap_mode="r"),
    )


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "apollo_optax"


def content_key(documents: Iterable[Document], vocab_size: int) -> str:
    """Returns a key that changes with anything the cached files depend on."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, tokenizers.__version__, vocab_size)).encode())
    for name, text in documents:
        digest.update(repr((name, len(text))).encode())
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def in_validation(name: str) -> bool:
    """Whether a document is held out: by a hash of its name, so adding others moves none."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number < VALIDATION_SHARE * 2**64


def build(documents: list[Document], vocab_size: int, folder: Path) -> None:
    """Trains the tokenizer and writes it and the tokens to `folder`, all of it or nothing."""
    train = [text for name, text in documents if not in_validation(name)]
    validation = [text for name, text in documents if in_validation(name)]
    if not train or not validation:
        raise UsageError(
            f"the corpus has {len(train)} training and {len(validation)} validation documents; "
            "it needs at least one of each, so add documents"
        )
    tokenizer = train_tokenizer(train, vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        built = Path(temporary) / folder.name
        built.mkdir()
        tokenizer.save(str(built / "tokenizer.json"))
        np.save(built / "train.npy", encode(tokenizer, train))
        np.save(built / "validation.npy", encode(tokenizer, validation))
        publish(built, folder)


def publish(built: Path, folder: Path) -> None:
    """Renames `built` to `folder`, unless another process was first with the same content."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(built)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE: it can spell any text, so there is no unknown token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the token ids of all texts in one row, each followed by `END`."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = tokenizer.token_to_id(END)
    rows = (np.array([*row.ids, end], dtype) for row in tokenizer.encode_batch(texts))
    return np.concatenate(list(rows))
