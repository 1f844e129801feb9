"""Windows of tokens: shuffled batches to train on, fixed ones to validate on.

S is a window's length, one more than the model's sequence length T: inputs are its first T tokens
and targets its last T.
"""

from collections.abc import Iterator
from typing import SupportsIndex

import grain
import numpy as np

from examples.llama.usage import UsageError

VALIDATION_WINDOWS = 128  # Enough to tell runs on the same windows apart, few enough to be quick.
VALIDATION_BATCH = 8


class Windows(grain.sources.RandomAccessDataSource[np.ndarray]):
    """The consecutive windows of a row of tokens; each overlaps the next by one token."""

    def __init__(self, tokens: np.ndarray, seq: int) -> None:
        self._tokens = tokens
        self._seq = seq

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._seq)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        start = int(index) * self._seq
        return np.asarray(self._tokens[start : start + self._seq + 1], np.int32)

    def __repr__(self) -> str:  # Grain prints its sources.
        return f"Windows({len(self)} of {self._seq} + 1 tokens)"


def train_batches(tokens: np.ndarray, *, seq: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Yields batches (B, S) for ever, shuffled anew each epoch; the seed alone sets their order."""
    windows = Windows(tokens, seq)
    if len(windows) < batch:
        raise UsageError(
            f"--batch {batch} of --seq {seq} needs {batch * seq + 1} training tokens and there "
            f"are {len(tokens)}; lower one of them"
        )
    shuffled = grain.MapDataset.source(windows).shuffle(seed).repeat()
    return iter(shuffled.batch(batch).to_iter_dataset())


def validation_batches(tokens: np.ndarray, *, seq: int) -> np.ndarray:
    """Returns windows spread evenly over `tokens`, the same for every run: (batches, B, S)."""
    windows = Windows(tokens, seq)
    if not len(windows):
        raise UsageError(f"--seq {seq} is longer than the {len(tokens)} validation tokens; lower it")
    batch = min(VALIDATION_BATCH, len(windows))
    count = min(VALIDATION_WINDOWS, len(windows)) // batch * batch
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    return np.stack([windows[index] for index in chosen]).reshape(-1, batch, seq + 1)
