"""Windows of tokens: shuffled batches to train on, fixed ones to validate on.

S is a window's length, one more than the model's sequence length T: inputs are its first T tokens
and targets its last T.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import grain
import numpy as np

from examples.llama.usage import UsageError

BATCHES_AHEAD = 4  # Read by each worker before they are asked for.
# Without end, for all purposes; Grain's own endless repetition is too long to be cut into batches of 1.
EPOCHS = 10**6


class Windows(grain.sources.RandomAccessDataSource[np.ndarray]):
    """The consecutive windows of each shard of tokens; each overlaps the next by one token."""

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


def train_loader(
    shards: Sequence[np.ndarray],
    *,
    seq: int,
    batch: int,
    seed: int,
    workers: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[np.ndarray]:
    """Returns batches without end, shuffled anew each epoch; the seed alone sets their order.

    The k-th batches of all processes together are the k-th of one process, and the state after k of
    them is the same on each, whatever `process_count` and `workers`: a checkpoint may move between
    meshes.

    Args:
        shards: training tokens (1-D), as of `Corpus.train`.
        seq: T, tokens a sequence.
        batch: B, sequences a step, of all processes together.
        seed: of the order.
        workers: threads that read ahead; with none, `next` reads.
        process_index: which of the processes this is.
        process_count: of how many; must divide `batch`.

    Returns:
        An iterator over int32 (B // process_count, S), with `get_state` and `set_state` for checkpoints.

    Raises:
        UsageError: where there are fewer windows than a batch takes, or a number is out of range.
    """
    windows = Windows(shards, seq)
    if len(windows) < batch:
        raise UsageError(
            f"--batch {batch} of --seq {seq} needs {batch * seq + 1} training tokens and there "
            f"are {token_count(shards)}; lower one of them, or give more text with --data"
        )
    if batch % process_count:
        raise UsageError(f"--batch {batch} is not a multiple of the {process_count} processes; change one")
    shuffled = grain.MapDataset.source(windows).shuffle(seed).repeat(EPOCHS)
    batches = shuffled[process_index::process_count].batch(batch // process_count)
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=BATCHES_AHEAD * workers)
    return iter(batches.to_iter_dataset(ahead))


def validation_batches(
    shards: Sequence[np.ndarray], *, seq: int, count: int = 128, batch: int = 8
) -> np.ndarray:
    """Returns windows spread evenly over `shards`, the same for every run: int32 (batches, B, S).

    Args:
        shards: validation tokens (1-D).
        seq: T, tokens a sequence.
        count: windows at the most, rounded down to whole batches.
        batch: B.

    Raises:
        UsageError: where there are fewer windows than one batch takes.
    """
    windows = Windows(shards, seq)
    if len(windows) < batch:
        raise UsageError(
            f"--seq {seq} in validation batches of {batch} needs {batch * seq + 1} validation tokens and "
            f"there are {token_count(shards)}; lower --seq, or give more text with --validation"
        )
    count = max(batch, min(count, len(windows)) // batch * batch)
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    return np.stack([windows[index] for index in chosen]).reshape(-1, batch, seq + 1)


def token_count(shards: Sequence[np.ndarray]) -> int:
    return sum(shard.size for shard in shards)
