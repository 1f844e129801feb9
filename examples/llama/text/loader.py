"""Shuffled batches of windows to train on, read ahead by Grain."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from examples.llama.run.errors import UsageError
from examples.llama.text.packing import Packed
from examples.llama.text.windows import Windows, token_count

BATCHES_AHEAD = 4  # The batches that each worker reads before they are asked for.
# The number is so large that the batches never end in practice. Grain's own endless
# repetition is too long to be split into batches of 1.
EPOCHS = 10**6


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
    """Returns endless batches of windows: int32 (B // process_count, S).

    Args:
        shards: training tokens (1-D), as of `Corpus.train`.
        seq: T, the tokens per sequence.
        batch: B. This and the other arguments are those of `batches_of`.
        seed: sets the order.
        workers: the number of threads that read ahead.
        process_index: the number of this process.
        process_count: the number of processes.

    Raises:
        UsageError: if there are fewer windows than a batch takes, or if `process_count`
            does not divide `batch`.
    """
    windows = Windows(shards, seq)
    if len(windows) < batch:
        raise UsageError(
            f"`batch` {batch} of `seq` {seq} needs {batch * seq + 1} training tokens "
            f"and there are {token_count(shards)}; lower one of them, "
            "or give more text with `data`"
        )
    return batches_of(
        windows,
        batch=batch,
        seed=seed,
        workers=workers,
        process_index=process_index,
        process_count=process_count,
    )


def batches_of(
    rows: Windows | Packed,
    *,
    batch: int,
    seed: int,
    workers: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Any]:
    """Returns endless batches, shuffled anew each epoch by the seed alone.

    The k-th batches of all processes together are the k-th of one process, and the
    state after k of them is the same on each, whatever `process_count` and `workers`: a
    checkpoint may move between meshes.

    Args:
        rows: the source of a batch's rows; it has at least `batch` of them.
        batch: B, the rows per step of all processes together.
        seed: sets the order. Epoch 2 of a seed has the order of epoch 1 of the next.
        workers: the number of threads that read ahead; with none, `next` reads.
        process_index: the number of this process.
        process_count: the number of processes, which must divide `batch`.

    Returns:
        An iterator over `rows` stacked, B // process_count at a time, with `get_state`
        and `set_state` for checkpoints.

    Raises:
        UsageError: if `process_count` does not divide `batch`.
    """
    if batch % process_count:
        raise UsageError(
            f"`batch` {batch} is not a multiple of the {process_count} processes; "
            "change one"
        )
    source: Any = rows  # Grain's type of a source says what its rows are.
    shuffled = grain.MapDataset.source(source).shuffle(seed).repeat(EPOCHS)
    batches = shuffled[process_index::process_count].batch(batch // process_count)
    ahead = grain.ReadOptions(
        num_threads=workers, prefetch_buffer_size=BATCHES_AHEAD * workers
    )
    return iter(batches.to_iter_dataset(ahead))
