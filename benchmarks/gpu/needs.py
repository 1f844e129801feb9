"""The packages that the parts import, to prepare a machine without a network."""

from importlib import metadata
from pathlib import Path

# The distributions and what needs them. Their own requirements come with them.
REQUIRED = {
    "jax": "everything; on a GPU with its CUDA plugin",
    "jaxlib": "everything",
    "numpy": "everything",
    "optax": "everything",
    "flax": "the model",
    "grain": "batches",
    "matplotlib": "figures",
    "orbax-checkpoint": "the trainer",
    "rich": "sizes of memory",
    "safetensors": "weights in Hugging Face's format",
    "tensorboardX": "the trainer",
    "tokenizers": "text",
    "tqdm": "progress",
}
OPTIONAL = {
    "torch": "`step`: its fused AdamW, and what apollo-torch needs",
    "apollo-torch": "`step`: the authors' release (CC-BY-NC)",
    "bitsandbytes": "what apollo-torch imports",
    "transformers": "what apollo-torch imports",
}
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tested() -> dict[str, str]:
    """Returns the versions in constraints.txt."""
    lines = CONSTRAINTS.read_text().splitlines()
    pairs = (
        line.split("==") for line in lines if "==" in line and not line.startswith("#")
    )
    return {name.strip().lower(): version.strip() for name, version in pairs}


def report() -> str:
    """Returns a line per package: its installed and its tested version, and its use."""
    versions = tested()
    lines = ["package, installed, last tested with, needed for"]
    for packages, missing in ((REQUIRED, "MISSING"), (OPTIONAL, "missing, optional")):
        for name, why in packages.items():
            version = versions.get(name, "")
            lines.append(f"{name}, {installed(name) or missing}, {version}, {why}")
    return "\n".join(lines)


def missing() -> list[str]:
    return [name for name in REQUIRED if installed(name) is None]
