"""The parts of the benchmarks' tables that depend on results."""

import math

import pytest

from benchmarks import quality, report
from examples.llama.run.errors import UsageError


@pytest.mark.parametrize(
    ("results", "spread"),
    [([1.0, 2.0, 3.0], "1.00"), ([1.0], ""), ([1.0, math.inf], "")],
)
def test_a_spread_needs_two_results_and_no_divergence(results, spread):
    assert report.spread(results) == spread


@pytest.mark.parametrize(("seeds", "match"), [((), "is empty"), ((0, -1), "-1 is out")])
def test_rejects_seeds(seeds, match, tmp_path):
    with pytest.raises(UsageError, match=f"--seeds {match}"):
        quality.QualityOptions(out=tmp_path, seeds=seeds)
