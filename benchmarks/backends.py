# SPDX-License-Identifier: Apache-2.0
"""Speed of the statistics backends: 256 MB of bfloat16, against a copy of the same.

    python benchmarks/backends.py [cpu|cuda]

prints one JSON object: medians of seven runs, gigabytes read a second, and for a GPU
the share of the bandwidth that a device-to-device copy reaches (it reads and writes).
"""

import datetime as dt
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.statistics.select import select_backend
from pytest_msprobe.statistics.spec import whole

BYTES = 256 * 2**20
RUNS = 7


def seconds(action: Callable[[], object], device: str) -> float:
    """Median duration of an action, the device idle before and after."""
    found = []
    for _ in range(RUNS + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def main() -> int:
    """Measures one device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = sys.argv[1] if len(sys.argv) > 1 else default
    torch.set_num_threads(1)
    x = torch.randn(BYTES // 2 // 4096, 4096, device=device).to(torch.bfloat16)
    backend, reason = select_backend(device)
    rows = np.zeros((1, ROW_WIDTH))
    own = seconds(lambda: backend.measure(x, [[whole(x.shape)]], rows), device)
    report = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "backend": reason,
        "torch": str(torch.__version__),
        "bytes": BYTES,
        "gigabytes_a_second": round(BYTES / own / 1e9, 2),
    }
    if device == "cuda":
        y = torch.empty_like(x)
        copy = 2 * BYTES / seconds(lambda: y.copy_(x), device)
        report["device"] = torch.cuda.get_device_name()
        report["share_of_copy_bandwidth"] = round(BYTES / own / copy, 3)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
