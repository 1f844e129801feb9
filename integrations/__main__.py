"""Runs integrations, each in a virtual environment of its own with pinned versions.

``python -m integrations`` runs all of them, ``python -m integrations maxtext flax`` the
named ones. Needs Python 3.11 or newer with pip, the program `patch`, and Python 3.12 on
the path, which uv downloads if there is none.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
ENVIRONMENTS = FOLDER / ".envs"
# MaxText needs this version or a newer one, and one version for all keeps this short.
PYTHON = "3.12"
DEVICES = 8


def installed_uv() -> pathlib.Path:
    """The path of uv, which is installed with pip if this machine has none.

    pip alone takes ten minutes for MaxText's 240 packages, and uv takes seconds.
    """
    found = shutil.which("uv")
    if found:
        return pathlib.Path(found)
    environment = ENVIRONMENTS / "uv"
    uv = environment / "bin" / "uv"
    if not uv.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", "uv"], check=True)
    return uv


def made_environment(name: str) -> pathlib.Path:
    """The Python of the environment of `name`, which is rebuilt if its pins changed."""
    requirements = FOLDER / name / "requirements.txt"
    patch = FOLDER / name / f"{name}.patch"
    sources = [path for path in (requirements, patch) if path.exists()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    environment = ENVIRONMENTS / name
    python, stamp = environment / "bin" / "python", environment / "digest"
    if stamp.exists() and stamp.read_text() == digest:
        return python
    uv = installed_uv()
    make = [uv, "venv", "--quiet", "--clear", "--python", PYTHON, environment]
    subprocess.run(make, check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python]
    packages = ["--requirement", requirements, "--editable", FOLDER.parent]
    subprocess.run([*install, *packages], check=True)
    if patch.exists():
        (site_packages,) = environment.glob("lib/python*/site-packages")
        apply = ["patch", "--strip=1", f"--directory={site_packages}"]
        subprocess.run([*apply, f"--input={patch}"], check=True)
    stamp.write_text(digest)
    return python


def run(name: str) -> bool:
    """Whether the integration `name` passed its checks; prints what it printed."""
    print(f"=== {name}", flush=True)
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    try:
        command = [made_environment(name), "-m", f"integrations.{name}.train"]
        subprocess.run(command, check=True, cwd=FOLDER.parent, env=environment)
    except subprocess.CalledProcessError as error:
        print(f"{name}: {error}", flush=True)
        return False
    return True


def main() -> None:
    known = sorted(path.parent.name for path in FOLDER.glob("*/train.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}")
    names = parser.parse_args().names or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"no integration is called {unknown}; there are {known}")
    failed = [name for name in names if not run(name)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("all passed")


if __name__ == "__main__":
    main()
