"""A product of spikes and weights, and the sum of the rows whose spike is 1, against the share of ones, in one run.

    python benchmarks/spike_products.py

Both give the same bits (checked). Where the lines cross is up to which share a recurrence adds rows (`spike_product.MOST`).
"""

from __future__ import annotations

import ctypes

import _harness as h
import torch
from _device import machine
from _results import markdown, write

from snn_compile.lowering.cpp import spike_product

ROUNDS = 200
SIZES = ((128, 128, 128), (128, 256, 256), (128, 512, 512), (16, 512, 512))
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def measure(rows: int, depth: int, columns: int, share: float) -> dict[str, str]:
    torch.manual_seed(0)
    spikes, weight = (torch.rand(rows, depth) < share).float(), torch.randn(columns, depth).t()
    plan = spike_product.plan(spikes, weight, None)
    if plan is None:
        raise SystemExit("this machine's library adds up in an order that no sum of rows gives")
    plan.most = rows * depth  # however many
    as_rows, out, expected = weight.contiguous(), torch.empty(rows, columns), torch.empty(rows, columns)
    pointers = (spikes.data_ptr(), as_rows.data_ptr(), None, out.data_ptr())
    pause, sum_rows = spike_product.Pause(), spike_product.load().sum_rows
    runs = {
        "product": lambda: torch.mm(spikes, weight, out=expected),
        "rows": lambda: sum_rows(ctypes.byref(plan), *pointers, ctypes.byref(pause)),
    }
    times = {name: seconds * 1e6 for name, seconds in h.medians(h.interleaved(runs, rounds=ROUNDS)).items()}
    assert torch.equal(out, expected)
    return {
        "rows, depth, columns": f"{rows}, {depth}, {columns}",
        "share of ones": f"{share:.2f}",
        "product_us": f"{times['product']:.1f}",
        "rows_us": f"{times['rows']:.1f}",
        "rows_are_faster_by": f"{times['product'] / times['rows']:.2f}",
        **machine(),
    }


def main() -> None:
    rows = [measure(*size, share) for size in SIZES for share in SHARES]
    print(markdown(rows, list(rows[0])[:5]))
    print(write("spike_products_cpu", rows))


if __name__ == "__main__":
    main()
