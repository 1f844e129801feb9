"""The cache folder, and how files get into it whole."""

import os
import shutil
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "apollo_optax"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        written = Path(temporary) / path.name
        with written.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)


def publish(built: Path, folder: Path) -> None:
    """Renames `built` to `folder`, unless another process published it first."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(built)
