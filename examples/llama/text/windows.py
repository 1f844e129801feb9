"""Windows of tokens, and the fixed ones to validate on.

S is the length of a window, one more than the model's sequence length T: the inputs are
its first T tokens and the targets its last T.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from examples.llama.run.errors import UsageError


class Windows:
    """The consecutive windows of each shard; each overlaps the next by one token.

    This is a sequence, which Grain takes as a source of examples.
    """

    def __init__(self, shards: Sequence[np.ndarray], seq: int) -> None:
        self._shards = shards
        self._seq = seq
        counts = [max(0, (shard.size - 1) // seq) for shard in shards]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        index = int(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - int(self._ends[number - 1] if number else 0)) * self._seq
        return np.asarray(self._shards[number][start : start + self._seq + 1], np.int32)

    def __repr__(self) -> str:  # Grain prints its sources.
        return f"Windows({len(self)} of {self._seq} + 1 tokens)"


def validation_batches(
    shards: Sequence[np.ndarray], *, seq: int, count: int = 128, batch: int = 8
) -> np.ndarray:
    """Returns windows spread evenly over `shards`, equal for all runs.

    The array is int32 (batches, B, S).

    Args:
        shards: validation tokens (1-D).
        seq: T, tokens per sequence.
        count: windows at the most, rounded down to whole batches, but at least one.
        batch: B.

    Raises:
        UsageError: if there are fewer windows than one batch takes.
    """
    windows = Windows(shards, seq)
    if len(windows) < batch:
        raise UsageError(
            f"`seq` {seq} in validation batches of {batch} needs {batch * seq + 1} "
            f"validation tokens and there are {token_count(shards)}; lower `seq`, or "
            "give more text with `validation`"
        )
    count = max(batch, min(count, len(windows)) // batch * batch)
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    return np.stack([windows[index] for index in chosen]).reshape(-1, batch, seq + 1)


def token_count(shards: Sequence[np.ndarray]) -> int:
    return sum(shard.size for shard in shards)
