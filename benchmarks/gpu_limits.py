"""What one GPU can do, measured: the rate of a bf16 matrix product, of a copy within it, and of one to the host.

Run by gpu.py as a process of its own, which prints JSON; on a CPU it tells only that.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

PRODUCTS = {"8192 x 8192 x 8192": (8192, 8192, 8192), "16384 x 8192 x 4096": (16384, 8192, 4096)}
COPY = 4 << 30  # bytes
DATASHEET = {"H100 PCIe": 756e12, "H100": 990e12, "H200": 990e12, "B200": 2250e12, "A100": 312e12}  # dense bf16 FLOP/s


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median seconds of some work on the GPU, by its own clock, after three times that do not count."""
    for _ in range(3):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def product(m: int, n: int, k: int) -> float:
    """FLOP/s of a product of random bf16 matrices; of zeros it would be faster than any model's."""
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    return 2 * m * n * k / seconds(lambda: torch.mm(a, b, out=out), 50)


def measure() -> dict[str, Any]:
    """The device, and what it can do."""
    properties = torch.cuda.get_device_properties(0)
    there = torch.randn(COPY // 4, device="cuda")
    also, host = torch.empty_like(there), torch.empty(COPY // 4, pin_memory=True)
    rates = {name: product(*shape) / 1e12 for name, shape in PRODUCTS.items()}
    return {
        "device": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        },
        "tflops": {name: round(rate, 1) for name, rate in rates.items()},
        "peak_tflops": round(max(rates.values()), 1),
        "datasheet_tflops": next((rate / 1e12 for key, rate in DATASHEET.items() if key in properties.name), None),
        "copy_gb_s": round(2 * COPY / seconds(lambda: also.copy_(there), 10) / 1e9, 1),
        "to_host_gb_s": round(COPY / seconds(lambda: host.copy_(there, non_blocking=True), 5) / 1e9, 2),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(measure() if torch.cuda.is_available() else {"device": {"name": "CPU"}}))
