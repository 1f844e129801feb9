"""The config.json of a run, for tests of benchmarks that read it."""

from typing import Any


def config_of(corpus: str, date: str = "2026-11-28") -> dict[str, Any]:
    """Returns what benchmarks read from the config.json of a run, besides options."""
    return {
        "corpus": corpus,
        "made_with": {
            "jax": "0.10.2",
            "flax": "0.12.8",
            "optax": "0.2.8",
            "python": "3.11.9",
            "device": "A processor, 1 core",
            "date": date,
        },
    }
