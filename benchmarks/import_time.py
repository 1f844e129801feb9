"""What `import apollo_optax` costs over `import optax`: python -m benchmarks.import_time.

Fresh interpreters, the two in turn; medians of the wall time of each import statement.
"""

import statistics
import subprocess
import sys

ROUNDS = 9


def seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def main() -> None:
    pairs = [(seconds("apollo_optax"), seconds("optax")) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"python {sys.version.split()[0]}, {ROUNDS} rounds, medians")
    print("| import apollo_optax, s | import optax, s | ratio |\n|---|---|---|")
    print(f"| {ours:.2f} | {theirs:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
