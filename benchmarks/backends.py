# SPDX-License-Identifier: Apache-2.0
"""Speed of the statistics backends: 256 MB of bfloat16, and on a GPU less and more.

    python benchmarks/backends.py [cpu|cuda] [--save FILE]

prints one JSON object: medians of seven runs, gigabytes read a second, and for a GPU
the share of the bandwidth that a device-to-device copy reaches (it reads and writes).
On a GPU a run is twenty launches behind each other, as a capture starts them: with a
table that the launch writes, and no waiting. A kernel alone finds its table on the GPU.
Both with everything, and plain: without sketch and checksum. Memory is read again only
behind more than the card's cache holds.
"""

import argparse
import datetime as dt
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.statistics.select import select_backend
from pytest_msprobe.statistics.spec import as_rows, whole

BYTES = 256 * 2**20
RUNS = 7
LAUNCHES = 20
SIZES = (4 * 2**20, 64 * 2**20, BYTES, 1024 * 2**20)


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


def on_gpu(size: int) -> dict[str, float]:
    """Microseconds of launches and of a copy, and what share of its bandwidth it is."""
    from pytest_msprobe.statistics import cuda

    inputs = [
        torch.randn(size // 2, device="cuda").to(torch.bfloat16)
        for _ in range(max(1, -(-BYTES // size)))
    ]
    target, out = torch.empty_like(inputs[0]), torch.empty((1, ROW_WIDTH)).double()
    out = out.cuda()
    layout = as_rows(inputs[0].shape, inputs[0].stride())
    assert layout is not None
    spans = cuda.prepare(torch.bfloat16, [whole(inputs[0].shape)], layout[1], 2)
    ((_, others, _),) = spans.shared
    launcher = cuda.launcher(torch.device("cuda", 0))
    pending = cuda.Pending(launcher, torch.bfloat16)
    entry = torch.frombuffer(bytearray(spans.entries), dtype=torch.int64)
    table = entry.repeat(len(inputs), 1)
    table[:, 0] += torch.tensor([x.data_ptr() for x in inputs])
    table = table.cuda()
    parts = torch.arange(1, others + 1, dtype=torch.int32).cuda()

    def launches(*, is_complete: bool) -> None:
        for number in range(LAUNCHES):
            x = inputs[number % len(inputs)]
            pending.add(x.data_ptr(), 0, spans)
            pending.launch(out.data_ptr(), is_complete=is_complete)

    def kernels(*, is_complete: bool) -> None:
        for number in range(LAUNCHES):
            launcher.launch(
                torch.bfloat16,
                table[number % len(inputs)].data_ptr(),
                1,
                parts.data_ptr(),
                1 + others,
                out.data_ptr(),
                is_complete=is_complete,
            )

    def copies() -> None:
        for number in range(LAUNCHES):
            target.copy_(inputs[number % len(inputs)])

    def microseconds(action: Callable[[], object]) -> float:
        found = []
        for _ in range(RUNS + 2):
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # noqa: SLF001
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")  # type: ignore[no-untyped-call]
            start.record()
            action()
            end.record()
            end.synchronize()
            found.append(float(start.elapsed_time(end)) * 1e3 / LAUNCHES)
        return statistics.median(found[2:])

    copy = microseconds(copies)
    found: dict[str, float] = {
        "bytes": size,
        "copy_us": round(copy, 1),
        "copy_terabytes_a_second": round(2 * size / copy / 1e6, 2),
    }
    for name, start in (("launch", launches), ("kernel", kernels)):
        for what, is_complete in (("everything", True), ("plain", False)):
            own = microseconds(lambda: start(is_complete=is_complete))  # noqa: B023
            found[f"{name}_{what}_us"] = round(own, 1)
            found[f"{name}_{what}_share"] = round(copy / own / 2, 3)
    return found


def main() -> int:
    """Measures one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(1)
    x = torch.randn(BYTES // 2 // 4096, 4096, device=device).to(torch.bfloat16)
    backend, reason = select_backend(device)
    rows = np.zeros((1, ROW_WIDTH))
    own = seconds(lambda: backend.measure(x, [[whole(x.shape)]], rows), device)
    report: dict[str, object] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "backend": reason,
        "torch": str(torch.__version__),
        "bytes": BYTES,
        "gigabytes_a_second_waited_for": round(BYTES / own / 1e9, 2),
    }
    if device == "cuda":
        import triton

        report["device"] = torch.cuda.get_device_name()
        report["triton"] = triton.__version__
        report["launches"] = [on_gpu(size) for size in SIZES]
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.save:
        arguments.save.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
