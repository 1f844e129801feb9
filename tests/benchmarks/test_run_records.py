import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rate_search import SearchOptions, base_run, run_at
from benchmarks.run_records import Records, RunRecord, runs_made_with
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError
from tests.benchmarks.run_config import config_of

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
    record = RunRecord.of("1k", "apollo-mini", run, 3.0, ROWS, config_of("text"))
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


@pytest.mark.parametrize("data", ["python", "package-docs"])
def test_runs_of_another_text_are_not_taken_for_these(
    data: str, tmp_path: Path
) -> None:
    """The digest of a text is not known before a run has read it."""
    records = Records(tmp_path / "results.jsonl")
    records.add(record_of(mini(tmp_path)))
    run = dataclasses.replace(mini(tmp_path), data=data)
    with pytest.raises(UsageError, match=f"data: stdlib -> {data}"):
        records.find("1k", "apollo-mini", run)


def test_runs_with_different_texts_are_not_mixed(tmp_path: Path) -> None:
    run, path = mini(tmp_path), tmp_path / "results.jsonl"
    records = Records(path)
    records.add(record_of(run))
    # Parts may have different texts.
    records.add(record_of(run, part="8k", corpus="another"))
    before = path.read_text()
    other = record_of(run, contender="adamw", corpus="another")
    with pytest.raises(UsageError, match=r"adamw in part 1k .* text another"):
        records.add(other)
    assert path.read_text() == before
    path.write_text(before + json.dumps(other._asdict()) + "\n")
    with pytest.raises(UsageError, match=r"adamw in part 1k .* text another"):
        Records(path)


@pytest.mark.parametrize("text", ["no JSON", '{"part": "1k"}', "[1]", '{"part": "1'])
def test_a_line_that_is_no_result_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Records(path).add(record_of(mini(tmp_path)))
    with path.open("a") as file:
        file.write(text)
    with pytest.raises(UsageError, match=r"line 2 of .*results\.jsonl is not the resu"):
        Records(path)


def test_two_results_of_a_run_are_refused(tmp_path: Path) -> None:
    """Two commands at the same time may both make a run."""
    path = tmp_path / "results.jsonl"
    ours, theirs = Records(path), Records(path)
    for records in (ours, theirs):
        records.add(record_of(mini(tmp_path)))
    with pytest.raises(UsageError, match=r"line 2 .* second result of the run of apol"):
        Records(path)


def test_a_line_holds_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records = Records(path)
    records.add(record_of(mini(tmp_path), val_loss=None))
    before = path.read_text()
    assert json.loads(before)["val_loss"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.add(record_of(mini(tmp_path), seed=2, val_loss=float("inf")))
    assert path.read_text() == before


def test_a_table_says_how_its_runs_were_made_and_not_how_it_was_printed(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, date in zip(
        folders, ("2026-11-29", "2026-11-28", "2026-11-29"), strict=True
    ):
        folder.mkdir()
        config = {"optimizer": "adamw"} | config_of("text", date)
        (folder / "config.json").write_text(json.dumps(config))
    versions = "A processor, 1 core; jax 0.10.2, flax 0.12.8, optax 0.2.8"
    assert runs_made_with(folders).splitlines() == [
        f"{versions}; 2026-11-28",
        f"{versions}; 2026-11-29",
    ]
    record = record_of(mini(tmp_path))
    assert record.made_with == f"{versions}; 2026-11-28"
