"""Counts the kernels of programs that `--dump` kept.

Run it with `python -m benchmarks.gpu.launches OUT/step-hlo.zip`. A GPU takes some
microseconds to launch a kernel, which is most of the time of a step with many small
kernels.
"""

import argparse
import zipfile
from pathlib import Path

from benchmarks.hlo import launches
from benchmarks.report import markdown


def table(path: Path) -> str:
    """Returns how many kernels each program of a --dump launches."""
    with zipfile.ZipFile(path) as file:
        programs = {name: file.read(name).decode() for name in file.namelist()}
    rows = [
        [name.removesuffix(".txt"), f"{launches(text):,.0f}"]
        for name, text in programs.items()
    ]
    return markdown(["program", "kernels launched"], rows, numbers_from=1)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.launches", description=__doc__
    )
    parser.add_argument("dump", type=Path, help="a PART-hlo.zip")
    given = parser.parse_args(args)
    try:
        print(table(given.dump))
    except (OSError, zipfile.BadZipFile) as error:
        parser.error(f"{given.dump} is no file of --dump ({error})")


if __name__ == "__main__":
    main()
