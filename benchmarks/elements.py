# SPDX-License-Identifier: Apache-2.0
"""What comparing saved tensors element by element costs.

    python benchmarks/elements.py [--megabytes N] [--rounds N] [--save FILE]

Two tensors of every type, as `torch.save` writes them, differ in all elements. Figures
are bytes of both files a second of wall time, medians over the rounds, files in the
page cache; memory is what the process has beyond the mapped files at its peak.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pytest_msprobe.compare.elements import compare_tensors, threads
from pytest_msprobe.dump.pt import read_tensor

DTYPES = ("bfloat16", "float16", "float32")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def write(folder, dtype, size):
    """Two tensors of so many bytes each, in a process of its own: torch is large."""
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "dtype, size = getattr(torch, sys.argv[1]), int(sys.argv[2])\n"
        "x = torch.randn(size // dtype.itemsize).to(dtype)\n"
        "torch.save(x, sys.argv[3] + '/a.pt')\n"
        "torch.save(x * 1.02, sys.argv[3] + '/b.pt')\n"
    )
    arguments = [dtype, str(size), str(folder)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def gigabytes_a_second(folder, rounds, workers, *, is_full):
    golden, candidate = read_tensor(folder / "a.pt"), read_tensor(folder / "b.pt")
    taken = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            compare_tensors(golden, candidate, pool, is_full=is_full)
            taken.append(time.perf_counter() - start)
    # The first round reads the files.
    return 2 * golden.bits.nbytes / statistics.median(taken[1:]) / 1e9


def main():
    arguments = parse_arguments()
    workers = threads()
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in DTYPES:
            write(folder, dtype, arguments.megabytes << 20)
            judged, full = (
                gigabytes_a_second(folder, arguments.rounds, workers, is_full=is_full)
                for is_full in (False, True)
            )
            line = {"dtype": dtype, "judged": judged, "with_table": full}
            table.append(
                {k: v if k == "dtype" else round(v, 2) for k, v in line.items()}
            )
    print(
        "| dtype | judged, GB/s | with msProbe's metrics, GB/s |\n| --- | --- | --- |"
    )
    for line in table:
        print("| " + " | ".join(str(value) for value in line.values()) + " |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{workers} threads, peak memory {peak} MiB, mapped files included")
    if arguments.save:
        result = {
            "what": f"two tensors of {arguments.megabytes} MiB, all elements differ",
            "threads": workers,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": arguments.rounds,
            "dtypes": table,
        }
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
