import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rate_search import SearchOptions, base_run, run_at
from benchmarks.run_records import Records, RunRecord
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError

ROWS = [
    {"step": 1, "tokens": 1024, "tokens_per_s": 1.0},
    {"step": 2, "tokens": 2048, "tokens_per_s": 512.0},
    {"step": 800, "tokens": 819200, "tokens_per_s": 1024.0, "val_ppl": 20.0}
    | {"update_rms_over_lr": 0.25},
]


def mini(folder: Path) -> RunOptions:
    base = base_run(SearchOptions(out=folder), "1k", "apollo-mini")
    return run_at(base, "apollo-mini", 0.007, 0.03, 1)


def record_of(run: RunOptions, **others: Any) -> RunRecord:
    record = RunRecord.of("1k", "apollo-mini", run, 3.0, ROWS, "text")
    return record._replace(**others)


def test_a_file_gives_back_what_was_added(tmp_path: Path) -> None:
    run, path = mini(tmp_path), tmp_path / "deep" / "results.jsonl"
    records = Records(path)
    assert records.find("1k", "apollo-mini", run) is None
    records.add(record_of(run))
    for each in (records, Records(path)):
        found = each.find("1k", "apollo-mini", run)
        assert found is not None
        assert (found.lr, found.lr_embeddings, found.seed) == (0.007, 0.03, 1)
        assert (found.loss, found.update_rms, found.step_seconds) == (3.0, 0.25, 2.0)
        assert found.curve == [[800, 20.0]]
        assert each.find("8k", "apollo-mini", run) is None
        assert each.find("1k", "adamw", run) is None
        other = run_at(run, "apollo-mini", 0.014, 0.03, 1)
        assert each.find("1k", "apollo-mini", other) is None


def test_a_record_names_the_optimizers_own_defaults(tmp_path: Path) -> None:
    options = record_of(mini(tmp_path)).options
    assert options["projection"] == "rademacher"
    assert options["optimizer"] == "apollo-mini"
    assert not options.keys() & {"out", "seed", "resume", "workers"}


def test_runs_with_other_options_are_not_mixed(tmp_path: Path) -> None:
    run, path = mini(tmp_path), tmp_path / "results.jsonl"
    before = record_of(run)
    before.options["projection"] = "random"
    Records(path).add(before)
    with pytest.raises(UsageError, match="projection: random -> rademacher"):
        Records(path).find("1k", "apollo-mini", run)


def test_runs_with_different_texts_are_not_mixed(tmp_path: Path) -> None:
    run, records = mini(tmp_path), Records(tmp_path / "results.jsonl")
    records.add(record_of(run))
    records.add(record_of(run, part="8k", corpus="another"))
    records.of("1k", "apollo-mini", run)  # Parts may have different texts.
    records.add(record_of(run, contender="adamw", corpus="another"))
    with pytest.raises(UsageError, match="part 1k with different texts"):
        records.find("1k", "apollo-mini", run)


@pytest.mark.parametrize("text", ["no JSON", '{"part": "1k"}', "[1]"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UsageError, match=r"results\.jsonl is not a file of results"):
        Records(path)


def test_a_line_holds_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records = Records(path)
    for val_loss in (3.0, None):
        records.add(record_of(mini(tmp_path), val_loss=val_loss))

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = path.read_text().splitlines()
    rows = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert [row["val_loss"] for row in rows] == [3.0, None]
