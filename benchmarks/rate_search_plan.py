"""The contenders, parts and rates that `benchmarks.rate_search` compares.

A contender is an optimizer with options of its own, such as AdamW with clipping. A part
is a model, a text and a number of steps. Each part has a plan per contender, because
searching all rates of all of them would take weeks.
"""

from typing import Any, NamedTuple

from examples.llama.optimizers.recipes import RECIPES

# The options of each contender with the default settings: a b2 of 0.999, no clipping,
# and no updates in proportion to the weights.
# The folder of a run begins with the contender's name, so the options of a name must
# not change.
BASES: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in RECIPES},
    # This is a quarter of the width of tiny, and twice the default rank.
    "apollo-zero-rank-32": {"optimizer": "apollo-zero", "rank": 32},
    # APOLLO-Zero has Adam for the embedding and the head. These have less state there.
    **{
        f"apollo-zero-emb-{rule}": {
            "optimizer": "apollo-zero",
            "embeddings": rule,
            "head": rule,
        }
        for rule in ("adafactor", "adafactor-momentum", "racs", "scale", "flattening")
    },
}
EMBEDDING_CONTENDERS = tuple(
    name for name, options in BASES.items() if "embeddings" in options
)
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"clip_norm": 1.0},
    "b2-0.95": {"b2": 0.95},
    "b2-0.95-clip": {"b2": 0.95, "clip_norm": 1.0},
    "relative": {"relative": True},
    "b2-0.95-relative": {"b2": 0.95, "relative": True},
    "b2-0.95-clip-relative": {"b2": 0.95, "clip_norm": 1.0, "relative": True},
}
# The further settings of a contender. Each is a contender of its own.
ALL_SETTINGS = ("adamw", "muon", "apollo-zero", "apollo-zero-momentum")
NO_CLIPPING = (
    "apollo-zero-rank-32",
    "apollo-zero-whitening",
    "apollo-zero-momentum-int8",
    "apollo-mini",
    "racs",
    "swan",
    "apollo-zero-emb-adafactor",
    "apollo-zero-emb-adafactor-momentum",
)
SETTINGS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ALL_SETTINGS, tuple(SETTINGS)),
    **dict.fromkeys(NO_CLIPPING, ("b2-0.95", "relative", "b2-0.95-relative")),
}


def variants_of(name: str) -> tuple[str, ...]:
    """Returns a contender with the default settings and with its further ones."""
    further = (f"{name}-{setting}" for setting in SETTINGS_OF.get(name, ()))
    return (name, *further)


# The variants of an optimizer are next to each other, as in the tables.
CONTENDERS: dict[str, dict[str, Any]] = {
    variant: BASES[name] | SETTINGS.get(variant.removeprefix(f"{name}-"), {})
    for name in BASES
    for variant in variants_of(name)
}


def plain_variants_of(name: str) -> tuple[str, ...]:
    """Returns those of `variants_of` without relative updates.

    With relative updates, AdamW and Muon are no longer the optimizers that goals are
    about. A rule of this library may have them in a goal over AdamW or Muon. In a goal
    over another rule of this library, neither side has them.
    """
    return tuple(
        variant
        for variant in variants_of(name)
        if "relative" not in CONTENDERS[variant]
    )


ADAMW_VARIANTS = plain_variants_of("adamw")
MUON_VARIANTS = plain_variants_of("muon")
EMBEDDING_VARIANTS = tuple(
    variant for name in EMBEDDING_CONTENDERS for variant in variants_of(name)
)


class Plan(NamedTuple):
    """The runs of a contender in a part.

    A rate is given as its ratio to the contender's default rate. Without ratios, it is
    searched in factors of 2 until the rates on both sides of the best are worse.

    Attributes:
        lr: ratios of the kernels' rate, or None to search it.
        lr_embeddings: ratios of the rate of embeddings, head and norms, or None to
            search it. It is varied at the best rate of the kernels.
        seeds: how many seeds the best pair of rates runs with, or None for all.
    """

    lr: tuple[float, ...] | None = None
    lr_embeddings: tuple[float, ...] | None = None
    seeds: int | None = None


def at(
    *lr: float,
    lr_embeddings: tuple[float, ...] | None = (1.0,),
    seeds: int | None = 1,
) -> Plan:
    """Returns a plan with given rates.

    `at(0.5, 1.0)` has half the default rate of the kernels and the default rate. The
    rate of embeddings is the default one unless `lr_embeddings` is given.
    """
    return Plan(lr, lr_embeddings, seeds)


SEARCH = Plan()
THREE_RATES = at(0.5, 1.0, 2.0)


class Part(NamedTuple):
    """A setting that contenders are compared in.

    Attributes:
        run: the options of `pretrain` that all its runs share.
        plans: the contenders that are trained, and the runs of each.
        drawn: the contenders in the figures, or none for all.
    """

    run: dict[str, Any]
    plans: dict[str, Plan]
    drawn: tuple[str, ...] = ()


OTHERS = dict.fromkeys(
    (
        "adafactor",
        "apollo",
        "apollo-svd",
        "galore",
        "lion",
        "scale-hidden",
        "sgd",
        "sinkgd",
    ),
    THREE_RATES,
)
# A contender without a search is run at the best rates that a search of the same
# optimizer found, or near these, or at three rates. The later parts take longer, so
# they have fewer rates.
PLANS_OF_1K = {
    **dict.fromkeys(("adamw", "muon", "apollo-mini", "apollo-zero", "racs"), SEARCH),
    "apollo-zero-relative": SEARCH,
    "apollo-zero-whitening-relative": SEARCH,
    "apollo-zero-momentum-relative": SEARCH,
    **OTHERS,
    "swan": THREE_RATES,
    "adamw-clip": at(1.0, seeds=None),
    "adamw-b2-0.95": at(1.0, seeds=None),
    "adamw-b2-0.95-clip": at(1.0),
    "adamw-relative": at(0.5, 1.0),
    "muon-relative": at(0.25, 0.5, 1.0, seeds=None),
    "apollo-zero-momentum": at(0.5, seeds=None),
    "apollo-zero-momentum-int8": at(0.5),
    "apollo-zero-rank-32-relative": at(0.5, seeds=None),
    "apollo-mini-relative": at(0.5),
    "racs-relative": at(1.0),
    "apollo-zero-emb-adafactor": at(0.5, lr_embeddings=None, seeds=None),
    "apollo-zero-emb-adafactor-momentum": at(0.5, lr_embeddings=(0.5, 1.0), seeds=None),
    "apollo-zero-emb-adafactor-momentum-relative": at(0.5),
    "apollo-zero-emb-racs": at(0.5, lr_embeddings=None),
    "apollo-zero-emb-scale": at(0.5, lr_embeddings=None),
    "apollo-zero-emb-flattening": at(0.5, lr_embeddings=(0.25, 1.0)),
}
PLANS_OF_8K = {
    "adamw-b2-0.95-clip": SEARCH,
    "muon-b2-0.95": SEARCH,
    "apollo-mini": SEARCH,
    "apollo-zero-b2-0.95-relative": SEARCH,
    "apollo-zero-whitening-b2-0.95-relative": SEARCH,
    "apollo-zero-momentum-b2-0.95-relative": SEARCH,
    **OTHERS,
    "swan": at(1.0, 2.0, 4.0),
    "swan-b2-0.95-relative": at(2.0, lr_embeddings=(1.0, 2.0)),
    "adamw": at(1.0, 2.0, 4.0, seeds=None),
    "adamw-b2-0.95": at(2.0),
    "adamw-b2-0.95-clip-relative": at(2.0, lr_embeddings=(1.0, 2.0), seeds=None),
    "muon": at(2.0, 4.0, 8.0, seeds=None),
    "muon-b2-0.95-clip": at(4.0),
    "muon-b2-0.95-relative": at(2.0, lr_embeddings=(1.0, 2.0)),
    "apollo-zero": at(0.5, 1.0, 2.0, seeds=None),
    "apollo-zero-b2-0.95": at(1.0, seeds=None),
    "apollo-zero-b2-0.95-clip": at(1.0),
    "apollo-zero-momentum": at(1.0),
    "apollo-zero-momentum-b2-0.95": at(1.0, seeds=None),
    "apollo-zero-momentum-int8-b2-0.95-relative": at(1.0),
    "apollo-zero-rank-32-b2-0.95-relative": at(1.0, seeds=None),
    "apollo-mini-b2-0.95-relative": at(0.25, 0.5, 1.0),
    "racs": at(2.0, 4.0, 8.0, 16.0, seeds=None),
    "racs-b2-0.95-relative": at(2.0, 4.0, 8.0, seeds=None),
    "apollo-zero-emb-adafactor": at(1.0, lr_embeddings=None),
    "apollo-zero-emb-adafactor-b2-0.95": at(1.0),
    "apollo-zero-emb-adafactor-b2-0.95-relative": at(1.0),
    "apollo-zero-emb-adafactor-momentum-b2-0.95": at(1.0, seeds=None),
    "apollo-zero-emb-adafactor-momentum-b2-0.95-relative": at(
        1.0, lr_embeddings=None, seeds=None
    ),
}
PLANS_OF_6M = {
    "adamw-b2-0.95-clip": at(0.25, 0.5, 1.0),
    "muon-b2-0.95": at(2.0, 4.0),
    "apollo-zero-b2-0.95": at(0.5),
    "apollo-zero-b2-0.95-relative": at(0.25, 0.5, 1.0),
    "apollo-zero-whitening-b2-0.95-relative": at(0.5),
    "apollo-zero-momentum-b2-0.95": at(0.5),
    "apollo-zero-momentum-b2-0.95-relative": at(0.5),
    "apollo-mini-b2-0.95-relative": at(0.5),
}
PLANS_OF_LONG = {
    "adamw-b2-0.95-clip": at(1.0, 2.0),
    "muon-b2-0.95": at(2.0),
    "apollo-zero-b2-0.95-relative": at(0.25, 0.5),
    "apollo-zero-whitening-b2-0.95-relative": at(0.5),
    "apollo-zero-momentum-b2-0.95-relative": at(0.5),
    "apollo-mini-b2-0.95-relative": at(0.25),
}
PLANS_OF_DOCS = {
    "adamw-b2-0.95-clip": at(2.0),
    "adamw-b2-0.95-clip-relative": at(2.0),
    "muon-b2-0.95": at(4.0),
    "apollo-zero-b2-0.95-relative": at(1.0),
    "apollo-zero-whitening-b2-0.95-relative": at(1.0),
    "apollo-zero-momentum-b2-0.95-relative": at(1.0),
}

# Small micro-batches make a step of 64 sequences faster on a CPU, because their
# activations stay in its caches. The gradient is the same but for rounding.
BATCH_OF_8K = {"batch": 64, "accumulate": 8}
ON_8K: dict[str, Any] = {"model": "tiny", "steps": 300} | BATCH_OF_8K
PARTS: dict[str, Part] = {
    "1k": Part(
        {"model": "tiny", "batch": 8, "steps": 800},
        PLANS_OF_1K,
        (
            "apollo-zero-momentum-relative",
            "muon",
            "apollo-zero-relative",
            "apollo-zero",
            "racs",
            "adamw",
            "apollo-mini",
        ),
    ),
    "8k": Part(
        ON_8K,
        PLANS_OF_8K,
        (
            "apollo-zero-momentum-b2-0.95-relative",
            "muon-b2-0.95",
            "apollo-zero-b2-0.95-relative",
            "apollo-zero-whitening-b2-0.95-relative",
            "adamw-b2-0.95-clip-relative",
            "adamw-b2-0.95-clip",
            "racs",
            "apollo-mini",
        ),
    ),
    "6m": Part({"model": "6m", "steps": 300} | BATCH_OF_8K, PLANS_OF_6M),
    # These are 20 tokens per parameter, which is ten times the standard library, so
    # the text is larger. Micro-batches of 2 sequences are 20% faster than those of 8.
    # The other parts had finished runs when this was found.
    "long": Part(
        {"model": "tiny", "steps": 3200, "batch": 64, "accumulate": 32}
        | {"data": "python"},
        PLANS_OF_LONG,
    ),
    "docs": Part(ON_8K | {"data": "package-docs"}, PLANS_OF_DOCS),
}
