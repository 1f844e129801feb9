"""Sequences packed into rows, so that few tokens of a batch are padding."""

from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from examples.llama.model import Batch

# The most rows that have room and are still filled. More pack a little tighter.
OPEN_ROWS = 64


class Example(NamedTuple):
    """One sequence: its token ids, and the weight of each as a target."""

    tokens: np.ndarray  # int32 (T,)
    weights: np.ndarray  # float32 (T,)


class Fitted(NamedTuple):
    """Examples that fit a row, and how many were shortened or left out."""

    examples: list[Example]
    cut: int  # How many were longer than a row and lost their end.
    dropped: int  # How many were left out: too long, or with nothing to learn.


def fit(examples: Sequence[Example], row: int, *, cut: bool) -> Fitted:
    """Returns the examples that fit into `row` tokens and have something to learn.

    Args:
        examples: examples of any length.
        row: the largest number of tokens of an example.
        cut: whether to keep the start of a longer example. If not, it is left out.
    """
    kept, cuts = [], 0
    for example in examples:
        too_long = example.tokens.size > row
        short = Example(example.tokens[:row], example.weights[:row])
        # The first token is no target.
        if (cut or not too_long) and short.weights[1:].any():
            kept.append(short)
            cuts += too_long
    return Fitted(kept, cuts, len(examples) - len(kept))


def pack(sizes: Sequence[int], row: int, *, seed: int) -> list[list[int]]:
    """Returns rows of indexes into `sizes`, with a total size of at most `row` each.

    The sizes are taken in an order that depends on the seed, and each goes into the
    first row that has room for it.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # The tokens that each row still takes.
    first = 0  # The first row that is still filled.
    for index in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        size = sizes[index]
        fitting = (k for k in range(first, len(rows)) if room[k] >= size)
        number = next(fitting, len(rows))
        if number == len(rows):
            rows.append([])
            room.append(row)
        rows[number].append(index)
        room[number] -= size
        first = max(first, len(rows) - OPEN_ROWS)
    return rows


class Packed:
    """Rows of packed examples, as a source for Grain: each is a `Batch` of one row.

    Args:
        examples: examples of at most `row` tokens each.
        row: the number of tokens of a row, S.
        seed: decides which examples share a row.
    """

    def __init__(self, examples: Sequence[Example], row: int, *, seed: int) -> None:
        self._examples, self._row = examples, row
        self._rows = pack([each.tokens.size for each in examples], row, seed=seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        """Returns a row: leaves are (S,)."""
        tokens, segments = np.zeros((2, self._row), np.int32)
        weights = np.zeros(self._row, np.float32)
        start = 0
        for number, example in enumerate(self._rows[int(index)], 1):
            end = start + self._examples[example].tokens.size
            here, start = slice(start, end), end
            tokens[here], weights[here] = self._examples[example]
            segments[here] = number
        return Batch(tokens, segments, weights)

    def __repr__(self) -> str:  # Grain prints its sources.
        return f"Packed({len(self)} of {self._row} tokens)"


def evaluation_batches(packed: Packed, *, count: int, batch: int) -> Batch:
    """Returns rows spread evenly over `packed`, equal for all runs.

    Args:
        packed: at least one row.
        count: rows at the most.
        batch: B; rows of padding fill the last batch.

    Returns:
        A batch whose leaves are (K, B, S).
    """
    chosen = np.linspace(0, len(packed) - 1, min(count, len(packed))).astype(int)
    rows = [packed[index] for index in chosen]

    def stacked(*leaves: np.ndarray) -> np.ndarray:
        stack = np.stack(leaves)
        missing = -len(leaves) % batch
        filled = np.pad(stack, ((0, missing), (0, 0)))
        return filled.reshape(-1, batch, stack.shape[1])

    return Batch(*map(stacked, *rows))
