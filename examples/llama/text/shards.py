"""Token ids on disk: a split is a series of `.npy` files, read as memory maps."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.llama.text.split import Labelled
from examples.llama.text.tokenizer import Encoder

# The shards have 128 MiB of two-byte ids. Writing a split holds as much in memory.
SHARD_TOKENS = 2**26
# The tokenizer's threads get a batch, which ends with whichever of these comes first.
BATCH_DOCUMENTS = 512
BATCH_CHARS = 2**22


class ShardWriter:
    """Writes one split's tokens to `folder` as `<split>-<number>.npy`, up to `limit`.

    Ids take two bytes if the vocabulary allows it, and four otherwise.

    Attributes:
        documents: the number of documents that were written.
        tokens: the number of tokens, including end tokens.
        digest: the digest of the tokens.
    """

    def __init__(
        self, folder: Path, split: str, vocab_size: int, limit: int | None = None
    ) -> None:
        self._folder = folder
        self._split = split
        self._limit = limit
        self._buffer = np.empty(
            SHARD_TOKENS, np.uint16 if vocab_size <= 2**16 else np.uint32
        )
        self._filled = 0
        self._shards = 0
        self.documents = 0
        self.tokens = 0
        self.digest = hashlib.sha256()

    @property
    def full(self) -> bool:
        return self._limit is not None and self.tokens >= self._limit

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document (uint32, 1-D), which may continue in the next shard."""
        self.documents += 1
        self.tokens += tokens.size
        self.digest.update(tokens.data)
        while tokens.size:
            part = tokens[: self._buffer.size - self._filled]
            self._buffer[self._filled : self._filled + part.size] = part
            self._filled += part.size
            tokens = tokens[part.size :]
            if self._filled == self._buffer.size:
                self._write_shard()

    def close(self) -> None:
        """Writes the rest of the tokens."""
        if self._filled:
            self._write_shard()

    def _write_shard(self) -> None:
        np.save(
            self._folder / f"{self._split}-{self._shards:05}.npy",
            self._buffer[: self._filled],
        )
        self._shards += 1
        self._filled = 0


def read_shards(folder: Path, split: str) -> list[np.ndarray]:
    """Returns a split's tokens, one memory-mapped row per shard."""
    return [
        np.load(path, mmap_mode="r") for path in sorted(folder.glob(f"{split}-*.npy"))
    ]


def write_tokens(
    documents: Iterable[Labelled],
    encoder: Encoder,
    writers: Mapping[str, ShardWriter],
    *,
    until: Callable[[], bool],
    bar: "tqdm[Any]",
) -> None:
    """Encodes documents for the writers of their splits, one batch in memory at a time.

    Stops after the document with which `until` becomes true, so that the written tokens
    do not depend on how documents are batched.
    """
    for batch in batches(documents):
        rows = encoder.encode([document.text for _, document in batch])
        for (split, _), row in zip(batch, rows, strict=True):
            if not writers[split].full:
                writers[split].add(row)
                bar.update(row.size)
            if until():
                return


def batches(documents: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    batch: list[Labelled] = []
    chars = 0
    for split, document in documents:
        batch.append((split, document))
        chars += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
