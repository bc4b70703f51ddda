"""What the benchmarks share: interleaved medians, the machine's description, CSV rows."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


class Sigmoid(torch.autograd.Function):
    """Heaviside forward, the derivative of a sigmoid of slope 4 backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(4.0 * x)
        return grad * 4.0 * s * (1.0 - s)


def lif_unbind(x: Tensor) -> Tensor:
    """The loop as a careful user writes it: `unbind` once, backward linear in T."""
    v, out = torch.zeros_like(x[0]), []
    for xt in x.unbind(0):
        h = v + (xt - v) / 2.0
        s = Sigmoid.apply(h - 1.0)
        v = h * (1.0 - s)
        out.append(s)
    return torch.stack(out)


def lif_index(x: Tensor) -> Tensor:
    """The natural loop over ``x[t]``: its eager backward is quadratic in T."""
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        h = v + (x[t] - v) / 2.0
        s = Sigmoid.apply(h - 1.0)
        v = h * (1.0 - s)
        out.append(s)
    return torch.stack(out)


def lif_scan(x: Tensor) -> Tensor:
    """The same neuron as a `scan`, of which one step is traced."""
    from torch._higher_order_ops.scan import scan

    def step(v: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        h = v + (xt - v) / 2.0
        s = Sigmoid.apply(h - 1.0)
        return h * (1.0 - s), s.clone()

    return scan(step, torch.zeros_like(x[0]), x)[1]  # type: ignore[no-any-return]


def first_call(step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What the step gives, and the seconds it takes: trace and compilation included, where it was never called before."""
    start = time.perf_counter()
    out = step()
    return out, time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of a call in a row of calls, as in training; the functions take turns, so that a slow minute hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()  # the caches and the allocator hold this function's data, not the last one's
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, str]:
    """Median, minimum and maximum in milliseconds."""
    return {
        "median_ms": f"{statistics.median(times) * 1e3:.2f}",
        "min_ms": f"{min(times) * 1e3:.2f}",
        "max_ms": f"{max(times) * 1e3:.2f}",
    }


def machine() -> dict[str, str]:
    """What a reader needs to place the numbers."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{model}, {torch.get_num_threads()} threads"
    return {"machine": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def write(name: str, rows: list[dict[str, str]]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def markdown(rows: list[dict[str, str]], columns: list[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(c, "") for c in columns) + " |" for row in rows]
    return "\n".join(lines)
