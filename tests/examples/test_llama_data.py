import itertools
import json
from pathlib import Path

import grain
import numpy as np
import pytest

from examples.llama.evaluate import rows_at_once
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError
from examples.llama.text import loader
from examples.llama.text.windows import Windows, validation_batches

# Windows of 9 tokens begin with 0, 9, ... 540, then with 700, 709, ... No window has
# tokens of both shards.
SHARDS = [np.arange(550, dtype=np.uint16), np.arange(700, 1151, dtype=np.uint32)]
STARTS = [*range(0, 541, 9), *range(700, 1142, 9)]


def batches_of(**settings: int) -> grain.DatasetIterator[np.ndarray]:
    return loader.train_loader(SHARDS, **{"seq": 9, "batch": 4, "seed": 0} | settings)


def first_batches(count: int = 5, **settings: int) -> np.ndarray:
    return np.stack(list(itertools.islice(batches_of(**settings), count)))


def test_windows_overlap_by_one_token() -> None:
    windows = Windows([np.arange(13)], 4)
    assert [windows[i].tolist() for i in range(len(windows))] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
    ]
    assert len(Windows([np.arange(12)], 4)) == 2


def test_windows_stay_within_a_shard() -> None:
    # The second shard has too few tokens for a window.
    windows = Windows([np.arange(7), np.arange(10, 13), np.arange(20, 28)], 3)
    assert [windows[i].tolist() for i in range(len(windows))] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [20, 21, 22, 23],
        [23, 24, 25, 26],
    ]


def test_batches_follow_the_seed_alone() -> None:
    assert first_batches().shape == (5, 4, 10)
    assert first_batches().dtype == np.int32
    np.testing.assert_array_equal(first_batches(), first_batches(workers=3))
    np.testing.assert_array_equal(first_batches(), first_batches(workers=0))
    assert not np.array_equal(first_batches(), first_batches(seed=1))


def test_an_epoch_has_every_window_once_and_the_next_another_order() -> None:
    assert len(STARTS) % 3 == 0
    starts = first_batches(2 * len(STARTS) // 3, batch=3)[:, :, 0]
    first, second = starts.reshape(2, -1)
    assert sorted(first) == sorted(second) == STARTS
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_batches_of_one(processes: int, workers: int) -> None:
    steps = 70  # More than two epochs.
    alone = first_batches(steps)
    parts = [
        first_batches(
            steps, process_index=index, process_count=processes, workers=workers
        )
        for index in range(processes)
    ]
    assert parts[0].shape == (steps, 4 // processes, 10)
    for whole, *shares in zip(alone, *parts, strict=True):
        together = np.concatenate(shares)
        assert sorted(whole[:, 0]) == sorted(together[:, 0])


def test_a_checkpoint_moves_between_process_counts_and_workers() -> None:
    whole = first_batches(12)
    states = []
    for processes, workers in ((1, 0), (1, 3), (2, 1), (4, 2)):
        for index in range(processes):
            batches = batches_of(
                process_index=index, process_count=processes, workers=workers
            )
            for _ in range(7):
                next(batches)
            states.append(json.loads(json.dumps(batches.get_state())))
    assert all(state == states[0] for state in states)
    for processes, workers in ((1, 1), (2, 0), (2, 2)):
        parts = []
        for index in range(processes):
            batches = batches_of(
                process_index=index, process_count=processes, workers=workers
            )
            batches.set_state(states[0])
            parts.append(np.stack(list(itertools.islice(batches, 5))))
        np.testing.assert_array_equal(
            np.sort(np.concatenate(parts, axis=1)[:, :, 0], axis=1),
            np.sort(whole[7:, :, 0], axis=1),
        )


def test_validation_windows_are_spread_and_fixed() -> None:
    shards = [np.arange(60_000), np.arange(60_000, 100_000)]
    batches_KxBxS = validation_batches(shards, seq=10)
    assert batches_KxBxS.shape == (16, 8, 11)
    assert batches_KxBxS.dtype == np.int32
    assert batches_KxBxS[0, 0, 0] == 0
    assert batches_KxBxS[-1, -1, -1] > 99_900
    np.testing.assert_array_equal(batches_KxBxS, validation_batches(shards, seq=10))
    assert validation_batches([np.arange(50)], seq=10, batch=4).shape == (1, 4, 11)
    assert validation_batches(shards, seq=10, batch=200).shape == (1, 200, 11)


def test_rejects_too_few_tokens() -> None:
    message = "`batch` 4 of `seq` 300 needs 1201 training tokens and there are 1001; lower one of them, or"
    with pytest.raises(UsageError, match=message):
        batches_of(seq=300)
    message = "`seq` 10 in validation batches of 8 needs 81 validation tokens and there are 50; lower `seq`, or"
    with pytest.raises(UsageError, match=message):
        validation_batches([np.arange(50)], seq=10)
    with pytest.raises(
        UsageError,
        match="there are 1001; lower `seq`, or give more text with `validation`",
    ):
        validation_batches(SHARDS, seq=1000, batch=1)


def test_processes_must_divide_the_batch() -> None:
    with pytest.raises(
        UsageError, match="`batch` 4 is not a multiple of the 3 processes; change one"
    ):
        batches_of(process_count=3)


def test_batches_of_one_window() -> None:
    batches = loader.train_loader([np.arange(1000)], seq=9, batch=1, seed=0)
    assert next(batches).shape == (1, 10)


@pytest.mark.parametrize(
    ("batch", "accumulate", "rows"),
    [(64, 1, 8), (64, 8, 8), (8, 1, 8), (12, 2, 4), (3, 1, 2), (8, 8, 1), (1, 1, 1)],
)
def test_an_evaluation_has_no_more_rows_than_a_step(
    batch: int, accumulate: int, rows: int
) -> None:
    options = RunOptions(out=Path("unused"), batch=batch, accumulate=accumulate)
    assert rows_at_once(options) == rows


@pytest.mark.parametrize(
    ("mesh", "batch", "rows"),
    [("fsdp=16", 16, 16), ("data=2,fsdp=4", 128, 64), ("tensor=4", 64, 8)],
)
def test_an_evaluation_has_rows_for_every_device(
    mesh: str, batch: int, rows: int
) -> None:
    options = RunOptions(out=Path("unused"), batch=batch, mesh=mesh)
    assert rows_at_once(options) == rows
